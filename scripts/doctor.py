"""Look at the whole set-up and say what to do. `python scripts/doctor.py --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from shutil import get_terminal_size
from typing import TextIO
from urllib.parse import urlsplit

import _path  # noqa: F401  # before the project's own modules
from config.settings import Settings, SettingsError, load_settings
from src.common import logging_config
from src.common.clock import SYSTEM
from src.doctor.judge import Finding, exit_code, failed, secrets_masked
from src.doctor.probes import examine

COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check settings, logins, mail servers, Redis, clock, ports, disk, archive and daemons. Changes nothing.",
        epilog="Exit code: 0 nothing failed (warnings or not), 1 a check failed, 2 a setting, the accounts or the handlers cannot be used.",
    )
    parser.add_argument("--json", action="store_true", help="a list of {check, status, detail, remedy}; status: ok, warn, fail")
    parser.add_argument("--offline", action="store_true", help="ask neither the token endpoint nor the mail servers")
    return parser


def show(findings: Sequence[Finding], out: TextIO) -> None:
    colour = out.isatty() and "NO_COLOR" not in os.environ
    width = max(len(finding.check) for finding in findings)
    room = max(40, get_terminal_size().columns - width - 8) if out.isatty() else 10_000
    for finding in findings:
        status = f"{finding.status:<4}"
        status = f"\x1b[{COLOURS[finding.status]}m{status}\x1b[0m" if colour else status
        lines = textwrap.wrap(finding.detail, room, break_on_hyphens=False) or [""]
        out.write(f"{status}  {finding.check:<{width}}  {lines[0]}\n")
        out.writelines(f"{'':{width + 8}}{line}\n" for line in lines[1:])
        if finding.remedy:
            out.write(f"{'':{width + 6}}→ {finding.remedy}\n")  # one line: it is there to be copied
    counts = Counter(finding.status for finding in findings)
    out.write(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed\n")


def secrets_of(settings: Settings) -> list[str]:
    """What no error of a library may carry onto the screen."""
    url = settings.redis.url.get_secret_value() if settings.redis.url else ""
    place = settings.run.raw_archive.get_secret_value() if settings.run.raw_archive else ""
    given = [settings.mail.password, settings.auth.client_secret]
    return [urlsplit(url).password or "", urlsplit(place).password or "", *(one.get_secret_value() for one in given if one)]


def main() -> int:
    given = arguments().parse_args()
    try:
        settings = load_settings()
    except SettingsError as error:
        findings = [failed("settings", str(error), "edit .env; .env.example explains each variable")]
    else:
        logging_config.configure(settings.run.log_format, "ERROR")
        with redirect_stdout(sys.stderr):  # a handler's module may print when it is loaded
            found = examine(settings, SYSTEM, offline=given.offline)
        secrets = secrets_of(settings)
        findings = [
            Finding(one.check, one.status, secrets_masked(one.detail, secrets), secrets_masked(one.remedy, secrets))
            for one in found
        ]
    if given.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        show(findings, sys.stdout)
    return exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
