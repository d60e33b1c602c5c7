"""start.sh, stop.sh, status.sh, health_check.sh, scale.sh, logs.sh, pause.sh, resume.sh and the systemd units, as an operator uses them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemons import ROOT
from tests.support.installed import Installed
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import ChildProcess
from tests.support.servers import need
from tests.support.wait import until

BOB = "bob@example.org"
UNITS = ROOT / "deploy" / "systemd"


@pytest.fixture
def installed(pipeline: Pipeline) -> Iterator[Installed]:
    found = Installed(pipeline)
    yield found
    found.close()


def test_the_life_of_an_installation(installed: Installed, pipeline: Pipeline) -> None:
    """Started, asked, more and fewer workers, each kind of pause over restarts, stopped; every mail is done, once."""
    own, run = pipeline.account, installed.run
    pipeline.write_token(BOB)
    installed.env["GMAIL_USERNAME"] = f"{own},{BOB}"
    assert "nothing runs" in run("status.sh", code=3)
    assert run("health_check.sh", code=2).startswith("DOWN: no producer runs; no worker runs")
    pipeline.deliver(*(f"mail {n}" for n in range(5)))

    output = run("start.sh")
    assert re.findall(r"start.sh: (\S+) ready after", output) and sorted(installed.pids()) == ["producer", "worker-1", "worker-2"]
    first = installed.pids()
    assert "producer, worker-1, worker-2 are running already" in run("start.sh", code=1)
    assert installed.pids() == first
    pipeline.wait_until_settled()
    output = run("status.sh")
    assert output.endswith("all well\n") and f"{own}/INBOX" in output and "nothing unfinished; 0 dead letters" in output
    assert run("health_check.sh").startswith("OK: 1 producer, 2 workers (")

    # more and fewer workers, while mail is at work
    run("scale.sh", "3")
    assert sorted(installed.pids()) == ["producer", "worker-1", "worker-2", "worker-3"]
    held = pipeline.deliver(*(f"slow {n}" for n in range(200, 260)))
    pipeline.wait_for_begun(held[:30])
    assert run("scale.sh", "1").count(" stopped (pid ") == 2
    assert installed.pids() == {name: first[name] for name in ("producer", "worker-1")}
    pipeline.wait_until_settled()

    # a mailbox held up by hand, over a restart of the producer; the other one goes on
    assert "paused; within two seconds" in run("pause.sh", f"{own}/INBOX", "--reason", "moving house")
    assert "paused already" in run("pause.sh", f"{own}/INBOX")
    installed.asked(first["producer"]).until("status", 200, r"PAUSED.*paused by hand since .*\(moving house\)")
    kept = pipeline.deliver("kept")
    run("stop.sh", "producer")
    assert "producer ready after" in run("start.sh", "--workers", "0")
    pipeline.deliver("for bob", account=BOB)
    done = pipeline.wait_until_settled(set(pipeline.delivered) - set(kept))
    assert not done.stream and kept[0] not in done.fates()
    output = run("status.sh", code=1)
    assert f"{own}/INBOX: PAUSED: paused by hand" in output and f"go on: ./scripts/resume.sh {own}/INBOX" in output
    assert run("health_check.sh", code=1).startswith("DEGRADED: ")

    # all workers held up: what is in flight is finished, new workers begin nothing
    [begun] = pipeline.deliver("hold gate", account=BOB)
    pipeline.wait_for_begun([begun])
    run("pause.sh", "--workers")
    installed.asked(first["worker-1"]).until("ready", 503, "not reading: paused by hand")
    waiting = pipeline.deliver("waits", account=BOB)
    pipeline.open_gate("gate")
    pipeline.wait_for_books(
        lambda books: begun in books.done and [fields["email_id"] for fields in books.stream.values()] == waiting,
        "one mail waits",
    )
    assert "worker-2 not reading: paused by hand" in run("scale.sh", "2")
    assert not pipeline.books().pending and waiting[0] not in {line.email_id for line in pipeline.lines("begin")}

    assert "paused by hand since" in run("resume.sh", f"{own}/INBOX")  # the workers still are
    assert "nothing is paused" in run("resume.sh", "--workers")
    assert "was not paused" in run("resume.sh", "--workers")
    pipeline.wait_until_settled()
    assert "stopping: SIGTERM" not in run("logs.sh", "worker-1", "-n", "1000") and "SIGTERM" in run("logs.sh", "worker-3")
    assert run("stop.sh").count(" stopped (pid ") == 3
    assert installed.pids() == {} and "nothing to stop" in run("stop.sh")
    pipeline.assert_accounted()


@pytest.mark.parametrize("began", ["another time", "the same time"])
def test_a_foreign_process_under_a_number_of_ours_is_left_alone(installed: Installed, began: str) -> None:
    """The pid file outlived its daemon, and its number went to another program: no script takes that for a worker, or ends it."""
    log = installed.pipeline.tmp / "foreign.log"
    foreign = ChildProcess(["sleep", "300"], log=log, env={"PATH": os.environ["PATH"]}, cwd=installed.pipeline.tmp)
    try:
        facts = (
            Path(f"/proc/{foreign.pid}/stat").read_text().rpartition(")")[2].split() if Path("/proc/self").exists() else [""] * 20
        )
        run = installed.root / "data" / "run"
        run.mkdir(parents=True)
        start = facts[19] if began == "the same time" else "17"
        (run / "worker-1.pid").write_text(f'{foreign.pid}\n{{"began": "{start}", "args": []}}\n')
        assert "nothing runs" in installed.run("status.sh", code=3)
        output = installed.run("stop.sh", "--kill", "--timeout", "1")
        assert f"worker-1 ended without stop.sh (pid {foreign.pid})" in output and "nothing to stop" in output
        assert installed.pids() == {} and foreign.running()
    finally:
        foreign.kill()


def test_a_worker_that_cannot_start_is_told_with_its_reason(installed: Installed) -> None:
    """Exit code 1, its own line of the log, no pid file; a wrong setting of the script itself is exit code 2."""
    output = installed.run("start.sh", "--no-producer", "--workers", "1", "--", "--handler", "nowhere:handle", code=1)
    assert "start.sh: worker-1 ended with exit code 2\n    worker.py: WORKER_HANDLER=nowhere:handle: cannot import" in output
    assert installed.pids() == {} and "may get ready" not in output
    assert "it could not run last time: worker.py: WORKER_HANDLER=nowhere:handle" in installed.run("status.sh", code=3)
    assert "there are: worker-1" in installed.run("logs.sh", "nope", code=2)
    assert "start.sh: LEASE_SECONDS=none" in installed.run("start.sh", code=2, LEASE_SECONDS="none")


def test_a_daemon_that_is_not_ready_in_time_goes_on_and_is_told(installed: Installed) -> None:
    """Redis is away: the script says so, for each, and the health check knows why."""
    away = {"REDIS_URL": "redis://127.0.0.1:1"}
    output = installed.run("start.sh", "--workers", "1", "--timeout", "1.5", code=1, **away)
    assert "producer is not ready: Redis does not answer" in output and "worker-1 is not ready: Redis does not answer" in output
    assert installed.run("health_check.sh", code=2, **away).startswith("DOWN: Redis does not answer")
    assert installed.run("stop.sh", **away).count(" stopped (pid ") == 2


@pytest.mark.full
def test_stop_waits_for_a_handler_and_kills_only_if_told_to(installed: Installed, pipeline: Pipeline) -> None:
    """A killed worker's mail, and one that stands still, are seen by status.sh and health_check.sh; another worker does the mail."""
    installed.run("start.sh", "--workers", "1")
    pipeline.deliver("hold gate")
    pipeline.wait_for_begun(pipeline.delivered)
    pid = installed.pids()["worker-1"]
    output = installed.run("stop.sh", "worker", "--timeout", "0.5", code=1)
    assert re.search(
        rf"worker-1 still runs \(pid {pid}, 1 in flight, the oldest for \d+ s\); to end it at once: .*--kill", output
    )
    os.kill(pid, signal.SIGSTOP)
    assert "worker-1: http://127.0.0.1:" in installed.run("health_check.sh", code=2)
    assert f"worker-1 was killed (pid {pid})" in installed.run("stop.sh", "worker", "--kill", "--timeout", "0.1")
    assert "! no worker runs" in installed.run("status.sh", code=1)
    pipeline.open_gate("gate")
    installed.run("scale.sh", "1", "--", "--concurrency", "3")
    pipeline.wait_until_settled()
    os.kill(installed.pids()["worker-1"], signal.SIGKILL)
    until(lambda: "worker-1: ended without stop.sh" in installed.run("status.sh", code=1), DEADLINE, "its end is seen")
    installed.run("scale.sh", "1")
    assert "--concurrency" in (installed.root / "data" / "run" / "worker-1.pid").read_text(), (
        "a killed worker is replaced by its like"
    )
    installed.run("stop.sh")
    pipeline.assert_accounted()


def test_once_leaves_a_paused_mailbox_alone(installed: Installed, pipeline: Pipeline) -> None:
    """And says so; a folder paused in all accounts is meant too."""
    pipeline.deliver("one")
    assert "no producer reads" not in installed.run("pause.sh", "INBOX", "--reason", "audit")
    unread = f"nobody@x/INBOX: no producer reads this now; known: {pipeline.account}/INBOX"
    assert unread in installed.run("pause.sh", "nobody@x/INBOX"), "it is paused, and noticed"
    with pipeline.producer("--once") as producer:
        assert producer.exit_code(DEADLINE) == 0
        assert "not read: paused by hand since" in producer.output()
    assert not pipeline.books().stream
    installed.run("resume.sh", "INBOX")
    with pipeline.producer("--once") as producer:
        assert producer.exit_code(DEADLINE) == 0
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_every_script_tells_its_arguments_before_anything_is_set_up(tmp_path: Path) -> None:
    """--help in a fresh clone, from another folder; a wrong argument is exit code 2."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("start", "stop", "status", "health_check", "scale", "logs", "pause", "resume"):
        command = [tmp_path / "scripts" / f"{name}.sh", "--help"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
        assert (done.returncode, done.stdout.split()[:2]) == (0, ["usage:", f"./scripts/{name}.sh"]), done.stderr
    assert not (tmp_path / ".venv").exists()


def test_systemd_takes_the_units_and_finds_little_open(tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent; its exposure level of every service is at most 2.0 of 10."""
    need(shutil.which("systemd-analyze") is not None, "systemd-analyze")
    for unit in UNITS.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/email-ingestion/.venv/bin/python", sys.executable))
    units = sorted(str(path) for path in tmp_path.iterdir())
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    for unit in units:
        if unit.endswith(".service"):
            command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", unit]
            judged = subprocess.run(command, capture_output=True, text=True)
            assert judged.returncode == 0, judged.stdout + judged.stderr
