"""What start.sh, stop.sh, status.sh, health_check.sh, scale.sh, logs.sh, pause.sh and resume.sh do; each of them tells its arguments."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import _path  # noqa: F401  # before the project's own modules
from _bulk import counted, positive
from _fleet import Daemon, Fleet, addresses, page, survey, troubles
from _processes import Folder, Launched, Process, Refused
from config.accounts import load_accounts
from config.settings import Settings, SettingsError, load_settings
from src.common import logging_config, pauses
from src.common.clock import SYSTEM, iso
from src.common.embedded import existing_redis, open_redis
from src.common.exceptions import ConfigurationError, IngestionError, Transient
from src.common.keys import Keys
from src.common.pauses import BY_HAND
from src.common.redis_client import RedisClient
from src.common.registry import Registration
from src.common.shutdown import Shutdown

READY_SECONDS = 60.0
LOOK_SECONDS = 0.2
SAY_SECONDS = 10.0
SHOWN = 10  # most mailboxes named in a warning
LAST_LINES = 5  # of the log of a daemon that did not get ready
STATUS_CODES = {"down": 3, "trouble": 1, "well": 0}
WORDS = {0: "OK", 1: "DEGRADED", 2: "DOWN"}


@dataclass(frozen=True)
class Desk:
    """What every command works with. `command`: the script as it was called."""

    command: str
    settings: Settings
    folder: Folder
    shutdown: Shutdown

    def say(self, text: str, *, error: bool = False) -> None:
        print(f"{self.command}: {text}", file=sys.stderr if error else sys.stdout, flush=True)


# start and scale


def start(desk: Desk, given: argparse.Namespace) -> int:
    args = tuple(given.args)
    with desk.folder.alone():
        alive = _cleared(desk)
        wanted = [] if given.no_producer else [("producer", () if given.workers else args)]
        wanted += [(f"worker-{number}", args) for number in range(1, given.workers + 1)]
        if not wanted:
            raise ConfigurationError("nothing to start: neither a producer nor workers")
        roles = {name.partition("-")[0] for name, _ in wanted}
        running = [process for process in alive if process.role in roles]
        if running:
            raise Refused(
                f"{_names(running)} running already, nothing was started. "
                "More or fewer workers: ./scripts/scale.sh N; all anew: ./scripts/stop.sh first"
            )
        started = [desk.folder.launch(name, args) for name, args in wanted]
    return _until_ready(desk, started, given.timeout)


def scale(desk: Desk, given: argparse.Namespace) -> int:
    with desk.folder.alone():
        known = [process for process in desk.folder.processes() if process.role == "worker"]
        workers = [process for process in _cleared(desk) if process.role == "worker"]
        surplus = workers[given.workers :]
        if surplus:
            return _end(desk, surplus, kill=False, timeout=None)
        before = (workers or known)[-1:]  # one that was killed is replaced by its like
        args = tuple(given.args) or (before[0].args if before else ())
        first = workers[-1].number + 1 if workers else 1
        missing = given.workers - len(workers)
        started = [desk.folder.launch(f"worker-{number}", args) for number in range(first, first + missing)]
    if not started:
        desk.say(f"{counted(given.workers, 'worker')}, as before")
        return 0
    return _until_ready(desk, started, given.timeout)


def _cleared(desk: Desk) -> list[Process]:
    """Those that are alive. A pid file of one that is not is removed; whatever has its number now is left alone."""
    alive = []
    for process in desk.folder.processes():
        if process.alive:
            alive.append(process)
        else:
            desk.say(f"{process.name} ended without stop.sh (pid {process.pid}); its log: {desk.folder.log_of(process.name)}")
            desk.folder.forget(process)
    return alive


def _until_ready(desk: Desk, launched: Sequence[Launched], seconds: float) -> int:
    """Wait for /ready of each; 0 if all are. One that is held up by hand is as ready as can be."""
    began = SYSTEM.monotonic()
    waiting, ready = list(launched), 0
    why: dict[str, str] = {}
    while waiting and SYSTEM.monotonic() - began < seconds and not desk.shutdown.wait(LOOK_SECONDS):
        known, away = _registered(desk.settings)
        for new in list(waiting):
            process, code = new.process, new.child.poll()
            if code is not None:
                desk.say(f"{process.name} ended with exit code {code}{_last_lines(new)}", error=True)
                desk.folder.forget(process)
                waiting.remove(new)
                continue
            is_ready, why[process.name] = _readiness(process, known, away)
            if is_ready:
                took = f"ready after {SYSTEM.monotonic() - began:.1f} s"
                address = known[process.pid].address
                desk.say(f"{process.name} {why[process.name] or took}; pid {process.pid}, {address}, log {new.log}")
                waiting.remove(new)
                ready += 1
    for new in waiting:
        name = new.process.name
        desk.say(f"{name} is not ready: {why.get(name, 'nobody waited for it')}{_last_lines(new)}", error=True)
    if ready == len(launched):
        return 0
    if ready or waiting:
        hope = " and may get ready yet" if waiting else ""
        desk.say(f"what runs goes on{hope}: ./scripts/status.sh tells, ./scripts/stop.sh ends it", error=True)
    return 1


def _registered(settings: Settings) -> tuple[dict[int, Registration], str]:
    """(by pid, why it cannot be known)"""
    try:
        redis = existing_redis(settings)
        if redis is None:
            return {}, "Redis does not answer"
        with redis:
            return addresses(redis, Keys(settings.stream.name)), ""
    except Transient as error:
        return {}, f"Redis: {error}"


def _readiness(process: Process, known: dict[int, Registration], away: str) -> tuple[bool, str]:
    registration = known.get(process.pid)
    if registration is None:
        return False, away or "not registered in Redis yet"
    code, body = page(registration.address, "/ready")
    reasons = body.get("why", [f"{registration.address}/ready does not answer"])
    held = bool(reasons) and all(BY_HAND in reason for reason in reasons)
    return code == 200 or held, "; ".join(reasons)


def _last_lines(new: Launched) -> str:
    """What it wrote since its start, the end of it."""
    with new.log.open("rb") as log:
        log.seek(new.offset)
        lines = deque((line.decode(errors="replace") for line in log), LAST_LINES)
    return "".join(f"\n    {line.rstrip()}" for line in lines) + f"\n    ({new.log})"


# stop


def stop(desk: Desk, given: argparse.Namespace) -> int:
    with desk.folder.alone():
        chosen = [process for process in _cleared(desk) if _is_named(process.name, given.names)]
        if not chosen:
            desk.say("nothing to stop")
            return 0
        return _end(desk, chosen, kill=given.kill, timeout=given.timeout)


def _end(desk: Desk, processes: Sequence[Process], *, kill: bool, timeout: float | None) -> int:
    """SIGTERM to each and wait for its end; 0 when all have ended."""
    settings = desk.settings
    longest = 2 * settings.run.shutdown_timeout + 4 * settings.redis.socket_timeout + 5  # by then a daemon ends itself
    seconds = longest if timeout is None else timeout
    known, _ = _registered(settings)
    _signal(processes, signal.SIGTERM)
    began, next_word = SYSTEM.monotonic(), 2.0
    while (left := [process for process in processes if process.alive]) and SYSTEM.monotonic() - began < seconds:
        if SYSTEM.monotonic() - began > next_word:
            next_word += SAY_SECONDS
            for process in left:
                desk.say(f"waiting for {process.name} (pid {process.pid}{_at_work(known.get(process.pid))})")
        if desk.shutdown.wait(LOOK_SECONDS):
            break
    for process in processes:
        if process not in left:
            desk.say(f"{process.name} stopped (pid {process.pid})")
            desk.folder.forget(process)
    if left and kill and not desk.shutdown.requested:
        for process in left:
            if process.alive:
                os.killpg(process.pid, signal.SIGKILL)  # it leads the group of what it started for its handlers
        while any(process.alive for process in left) and not desk.shutdown.wait(LOOK_SECONDS):
            continue
        for process in left:
            desk.say(f"{process.name} was killed (pid {process.pid}): its mail is taken over after LEASE_SECONDS")
            desk.folder.forget(process)
        return 0
    for process in left:
        held = _at_work(known.get(process.pid))
        desk.say(f"{process.name} still runs (pid {process.pid}{held}); to end it at once: ./scripts/stop.sh --kill", error=True)
    return 1 if left else 0


def _signal(processes: Sequence[Process], number: signal.Signals) -> None:
    for process in processes:
        if process.alive:
            os.kill(process.pid, number)


def _at_work(registration: Registration | None) -> str:
    """What a stopping worker still has in its hands."""
    status = page(registration.address, "/status")[1] if registration else {}
    if not status.get("in_flight"):
        return ""
    return f", {status['in_flight']} in flight, the oldest for {status['oldest_in_flight_seconds']:.0f} s"


# status and health


def status(desk: Desk, given: argparse.Namespace) -> int:
    fleet = survey(desk.settings, desk.folder, SYSTEM)
    found = troubles(fleet)
    if not fleet.live("producer") and not fleet.live("worker"):
        known = f"redis   {fleet.redis}{_stream(fleet)}\n" if fleet.redis else ""
        print(f"{known}nothing runs; to start: ./scripts/start.sh")
        for words in filter(None, fleet.last_words.values()):
            print(f"it could not run last time: {words}")
        return STATUS_CODES["down"]
    _table(("DAEMON", "STATE", "PID", "UP", "ENDPOINT", "WORK"), [_row(daemon) for daemon in fleet.present])
    boxes = [box for daemon in fleet.live("producer") for box in daemon.page.get("mailboxes", [])]
    if boxes:
        print()
        _table(("MAILBOX", "STATE", "LAST CONTACT", "TO READ", "PUBLISHED", "UNACCOUNTED"), [_mailbox_row(box) for box in boxes])
    print(f"\nredis   {fleet.redis or 'does not answer'}{_stream(fleet)}")
    for field, value in sorted(fleet.paused.items()):
        print(f"paused  {_target(field)}: {pauses.told(value)}")
    print("\nall well" if not found else "\nto do")
    for trouble in found:
        print(f"  {'!' if trouble.level == 2 else '-'} {trouble.text}" + (f"\n      {trouble.remedy}" if trouble.remedy else ""))
    if fleet.overview and fleet.overview.dead:
        print(f"  - {counted(fleet.overview.dead, 'dead letter')}: python scripts/dlq.py groups")
    return STATUS_CODES["trouble" if found else "well"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(daemon: Daemon) -> tuple[str, ...]:
    page, counts = daemon.page, daemon.page.get("counts", {})
    work = f"{page['in_flight']} in flight, {counts.get('done', 0)} done" if "in_flight" in page else ""
    if "mailboxes" in page:
        work = f"{len(page['mailboxes'])} mailbox{'' if len(page['mailboxes']) == 1 else 'es'}"
    up = _span(page["uptime_seconds"]) if page else ""
    return daemon.name, daemon.state, str(daemon.pid), up, daemon.address.removesuffix("/"), work


def _mailbox_row(box: dict[str, object]) -> tuple[str, ...]:
    silent = box["seconds_since_contact"]
    contact = f"{_span(float(str(silent)))} ago" if silent is not None else "never"
    numbers = (str(box["lag"]), str(box["published"]), str(box["unaccounted"]))
    return (f"{box['account']}/{box['mailbox']}", str(box["state"]), contact, *numbers)


def _stream(fleet: Fleet) -> str:
    numbers = fleet.overview
    if numbers is None:
        return ""
    if not numbers.live:
        return f"\nstream  nothing unfinished; {counted(numbers.dead, 'dead letter')}"
    return (
        f"\nstream  {numbers.live} unfinished: {numbers.unread} unread, {numbers.in_flight} in flight, {numbers.waiting} wait for their "
        f"next attempt; the oldest for {_span(numbers.oldest)}; {counted(numbers.dead, 'dead letter')}"
    )


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"


def health_check(desk: Desk, given: argparse.Namespace) -> int:
    fleet = survey(desk.settings, desk.folder, SYSTEM)
    found = troubles(fleet)
    level = max((trouble.level for trouble in found), default=0)
    at_work = ", ".join(counted(len(fleet.live(role)), role) for role in ("producer", "worker"))
    numbers = fleet.overview
    said = "; ".join(trouble.text for trouble in found) or at_work
    dead = counted(numbers.dead, "dead letter") if numbers else ""
    flow = f"{numbers.live} unfinished, the oldest for {_span(numbers.oldest)}, {dead}" if numbers else ""
    print(f"{WORDS[level]}: {said}" + (f" ({flow})" if flow else ""))
    return level


# logs


def logs(desk: Desk, given: argparse.Namespace) -> int:
    known = sorted(desk.folder.logs.glob("*.log"), key=lambda path: (path.stem.partition("-")[0], len(path.stem), path.stem))
    files = [str(path) for path in known if _is_named(path.stem, given.names)]
    if not files:
        there = f"there are: {', '.join(path.stem for path in known)}" if known else "nothing was started yet"
        raise ConfigurationError(f"no log of {', '.join(given.names) or 'anything'} in {desk.folder.logs}; {there}")
    os.execvp("tail", ["tail", "-n", str(given.lines), *(["-F"] if given.follow else []), *files])  # noqa: S606  # tail, and our own files


def _is_named(name: str, names: Sequence[str]) -> bool:
    """`names`: of daemons, or of a role; none: all."""
    return not names or name in names or name.partition("-")[0] in names


def _names(processes: Sequence[Process]) -> str:
    return f"{', '.join(process.name for process in processes)} {'is' if len(processes) == 1 else 'are'}"


# pause and resume


def pause(desk: Desk, given: argparse.Namespace) -> int:
    if not given.reason.isprintable():
        raise ConfigurationError("--reason: must be one printable line")

    def act(call: Callable[..., object], key: str, held: dict[str, str], field: str) -> str:
        since, _, reason = held.get(field, iso(SYSTEM.wall())).partition("|")
        call("HSET", key, field, f"{since}|{given.reason or reason}")
        return "paused already" if field in held else "paused; within two seconds nothing new is begun, what is in flight goes on"

    return _change(desk, given, act, warned=True)


def resume(desk: Desk, given: argparse.Namespace) -> int:
    def act(call: Callable[..., object], key: str, held: dict[str, str], field: str) -> str:
        return "resumed" if call("HDEL", key, field) else "was not paused"

    return _change(desk, given, act)


def _change(
    desk: Desk,
    given: argparse.Namespace,
    act: Callable[[Callable[..., object], str, dict[str, str], str], str],
    *,
    warned: bool = False,
) -> int:
    """`warned`: say so where nobody reads what is named."""
    accounts = [account for account in load_accounts(desk.settings.mail) if account.username]
    configured = [(account.username, mailbox) for account in accounts for mailbox in account.mail.mailboxes]
    targets = [pauses.parsed(target, [account.username for account in accounts]) for target in given.targets] + (
        [pauses.WORKERS] if given.workers else []
    )
    keys = Keys(desk.settings.stream.name)
    with open_redis(desk.settings, Shutdown()) as redis:
        held = redis.hash(keys.paused)
        for field in targets:
            desk.say(f"{_target(field)}: {act(redis.call, keys.paused, held, field)}")
        if warned and targets:
            _warn_of_unread(desk, targets, {*configured, *_read_before(redis, keys)})
        left = redis.hash(keys.paused)
    for field, value in sorted(left.items()):
        print(f"{_target(field)}: {pauses.told(value)}")
    if not left:
        print("nothing is paused")
    return 0


def _warn_of_unread(desk: Desk, targets: Sequence[str], mailboxes: Collection[tuple[str, str]]) -> None:
    known = ", ".join(f"{account}/{mailbox}" for account, mailbox in sorted(mailboxes)[:SHOWN]) or "none yet"
    more = f" and {len(mailboxes) - SHOWN} more" if len(mailboxes) > SHOWN else ""
    for field in pauses.meant_by_none(targets, mailboxes):
        desk.say(f"{_target(field)}: no producer reads this now; known: {known}{more}", error=True)


def _read_before(redis: RedisClient, keys: Keys) -> set[tuple[str, str]]:
    """(account, mailbox) that a producer keeps its place in."""
    cursor, found = "0", set[tuple[str, str]]()
    while True:
        cursor, page = redis.call("SCAN", cursor, "MATCH", keys.patterns()[0], "COUNT", 1000)
        found |= {keys.mailbox_of_last_uid(key) for key in page if keys.is_last_uid(key)}
        if str(cursor) == "0":
            return found


def _target(field: str) -> str:
    account, _, mailbox = field.partition("|")
    if field == pauses.WORKERS:
        return "all workers"
    return f"every folder of {account}" if not mailbox else f"{mailbox} of every account" if not account else pauses.named(field)


# the command line


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The scripts tell their arguments themselves: --help needs no Python yet."""
    parser = argparse.ArgumentParser(add_help=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Callable[[Desk, argparse.Namespace], int]) -> argparse.ArgumentParser:
        name = run.__name__
        found = commands.add_parser(name, prog=f"./scripts/{name}.sh", add_help=False)
        found.set_defaults(run=run)
        return found

    starting = command(start)
    starting.add_argument("--workers", type=_count, default=2)
    starting.add_argument("--no-producer", action="store_true")
    scaling = command(scale)
    scaling.add_argument("workers", type=_count)
    for launching in (starting, scaling):
        launching.add_argument("--timeout", type=float, default=READY_SECONDS)
    stopping = command(stop)
    stopping.add_argument("names", nargs="*")
    stopping.add_argument("--kill", action="store_true")
    stopping.add_argument("--timeout", type=float)
    command(status)
    command(health_check)
    showing = command(logs)
    showing.add_argument("names", nargs="*")
    showing.add_argument("-f", dest="follow", action="store_true")
    showing.add_argument("-n", dest="lines", type=positive, default=50)
    for changing in (command(pause), command(resume)):
        changing.add_argument("targets", nargs="*")
        changing.add_argument("--workers", action="store_true")
    commands.choices["pause"].add_argument("--reason", default="")
    own, bar, rest = _split(argv)
    given, unknown = parser.parse_known_args(own)
    called = commands.choices[given.command]
    if unknown and given.run in (start, scale) and unknown[0].startswith("-"):
        known = [word for word in own[1:] if word not in unknown]
        called.error(f"a worker's arguments go after --: {called.prog} {shlex.join([*known, '--', *unknown, *rest])}")
    if unknown:
        called.error(f"{shlex.join(unknown)} cannot stand there: {called.prog} --help tells what can")
    if bar and given.run not in (start, scale):
        called.error("-- goes with start.sh and scale.sh only")
    given.args = rest
    return given


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), at < len(argv), list(argv[at + 1 :])


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text} is no number of workers: 0, 1, 2, …")
    return int(text)


def main() -> int:
    given = arguments(sys.argv[1:])
    command = f"{given.command}.sh"
    shutdown = Shutdown()
    try:
        settings = load_settings()
        logging_config.configure(settings.run.log_format, "ERROR")
        if given.run in (start, scale, stop):
            shutdown.on_signals()
        code: int = given.run(Desk(command, settings, Folder(settings.run.data_dir), shutdown), given)
        return code
    except (SettingsError, IngestionError, Refused) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, (SettingsError, ConfigurationError)) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
