"""The benchmark runs, and has a row for every figure that is to be reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemons import ROOT
from tests.support.servers import have_dovecot, need

ROWS = {
    "drain": {"one worker, no-op, 5 KB", "two workers"},
    "intake": {"one producer", "over TLS", "through 50 ms of round trip"},
    "parse": {"record as JSON", "records that differ, of 200"},
    "handlers": {"20 ms, 64 threads", "20 ms, 1,000 async tasks"},
    "arrival": {f"to handler done, {what}" for what in ("idle, p50", "idle, p99", "300 mails/s, p50", "300 mails/s, p99")},
    "memory": {
        "producer, most",
        "producer, last third above the middle third",
        "worker, most while draining",
        "Redis for a million processed ids",
        "Redis above its base, stream empty, without the ids",
    },
    "growth": {
        "drain at 20,000 live mails, Redis 7.0",
        "drain at 20,000 live mails, embedded Valkey",
        "poll of an unchanged folder of 3,000",
        "2 workers, 20 ms, 8 at once",
        "4 workers, 20 ms, 8 at once",
    },
}


@pytest.mark.full
@pytest.mark.timeout(600)
def test_quick_measures_every_figure(tmp_path: Path) -> None:
    """`--quick` ends with 0, every row is there with a value, in the table, in JSON and in the plot; no timing decides, only sameness."""
    need(have_dovecot(), "dovecot-imapd")
    argv = [
        sys.executable,
        "-m",
        "tests.load.bench",
        "--quick",
        "--json",
        str(tmp_path / "b.json"),
        "--svg",
        str(tmp_path / "b.svg"),
    ]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["part"], set()).add(row["what"])
        assert row["what"] in ran.stdout
        assert row["value"] is not None
        if row["what"].startswith("records that differ"):
            assert row["value"] == 0
    assert found == ROWS
    assert (tmp_path / "b.svg").read_text().startswith("<svg")
