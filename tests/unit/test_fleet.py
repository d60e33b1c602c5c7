"""scripts/_fleet.py: what counts as trouble, how bad it is, and what to run. Pure."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import family

sys.modules["_path"] = importlib.import_module("scripts._path")  # its own folder is not on our path
processes = sys.modules["_processes"] = importlib.import_module("scripts._processes")
fleet = sys.modules["_fleet"] = importlib.import_module("scripts._fleet")
bulk = sys.modules["_bulk"] = importlib.import_module("scripts._bulk")
control = importlib.import_module("scripts.control")

BY_HAND = "not reading: paused by hand since 2026-01-31T08:00:00Z; go on: ./scripts/resume.sh --workers"


def daemon(role: str, state: str = "ok", *why: str, name: str = "", **more: Any) -> Any:
    return fleet.Daemon(name or role, role, state, "host", 1, why=why, **more)


def levels(*daemons: Any, redis: str = "Valkey 9.1.2") -> list[tuple[int, str]]:
    return [(trouble.level, trouble.text) for trouble in fleet.troubles(fleet.Fleet(daemons, redis))]


def test_a_producer_and_a_worker_at_work_are_all_well() -> None:
    """Also where they are on other machines."""
    assert levels(daemon("producer"), daemon("worker", "elsewhere")) == []


@pytest.mark.parametrize(
    ("daemons", "redis", "expected"),
    [
        ([daemon("producer")], "Valkey", [(2, "no worker runs")]),
        ([daemon("worker")], "Valkey", [(2, "no producer runs")]),
        ([daemon("producer", "starting", "x"), daemon("worker", "starting", "x")], "", [(2, "Redis does not answer")]),
        ([daemon("producer", "starting", "not yet"), daemon("worker")], "Valkey", [(1, "producer: not yet")]),
        ([daemon("producer", "degraded", "a/INBOX: REAUTH"), daemon("worker")], "Valkey", [(1, "producer: a/INBOX: REAUTH")]),
        ([daemon("producer"), daemon("worker", "stuck", "no turn")], "Valkey", [(2, "worker: no turn")]),
        ([daemon("producer"), daemon("worker", "not ready", "full")], "Valkey", [(2, "worker: full")]),
        (
            [daemon("producer"), daemon("worker", "not ready", "full", name="w1"), daemon("worker", name="w2")],
            "Valkey",
            [(1, "w1: full")],
        ),
        ([daemon("producer"), daemon("worker", "not ready", BY_HAND)], "Valkey", [(1, f"worker: {BY_HAND}")]),
        (
            [daemon("producer"), daemon("worker"), daemon("worker", "ended", name="w2")],
            "Valkey",
            [(1, "w2: ended without stop.sh")],
        ),
    ],
)
def test_what_is_wrong_and_how_bad_it_is(daemons: list[Any], redis: str, expected: list[tuple[int, str]]) -> None:
    """2 where mail does not flow or a daemon stands still; a pause by hand is never worse than 1."""
    assert levels(*daemons, redis=redis) == expected


def test_one_trouble_of_several_daemons_is_told_once() -> None:
    told = levels(daemon("producer"), *(daemon("worker", "not ready", BY_HAND, name=f"worker-{n}") for n in (1, 2)))
    assert told == [(1, f"worker-1, worker-2: {BY_HAND}")]


def test_a_killed_daemon_is_a_trouble_until_another_takes_its_place() -> None:
    """One of its role, started after its last sign of life."""
    killed = daemon("worker", "silent", name="w1", last_sign=100.0)
    [(level, text)] = levels(daemon("producer", started=200.0), daemon("worker", name="w2", started=50.0), killed)
    assert (level, text) == (1, "w1: no sign of life from host, pid 1: killed, or cut off")
    assert levels(daemon("producer"), daemon("worker", name="w2", started=101.0), killed) == []


def test_a_killed_daemon_that_nobody_replaced_is_told_for_some_minutes() -> None:
    """While others of its role run; with none of them it is told as long as it is known."""
    killed, other = daemon("worker", "silent", name="w1", last_sign=100.0), daemon("worker", name="w2", started=50.0)
    early, late = 100.0 + fleet.TOLD_SECONDS - 1, 100.0 + fleet.TOLD_SECONDS + 1

    def told(now: float, *workers: Any) -> bool:
        found = fleet.troubles(fleet.Fleet([daemon("producer"), *workers], "Valkey", now=now))
        return any("no sign of life" in trouble.text and "start it on host" in trouble.remedy for trouble in found)

    assert told(early, killed, other) and not told(late, killed, other) and told(late, killed)


def test_a_worker_that_ended_is_replaced_by_scale_to_as_many_as_were_started_here() -> None:
    """Those of systemd or of other machines do not count; without any, the usual two."""
    ended = daemon("worker", "ended", name="worker-2", ours=True)
    here = [daemon("producer"), daemon("worker", name="worker-1", ours=True), daemon("worker", name="w3"), ended]
    [trouble] = fleet.troubles(fleet.Fleet(here, "Valkey"))
    assert trouble.remedy == "./scripts/scale.sh 2  replaces it; ./scripts/logs.sh worker-2  may tell why"
    assert fleet.troubles(fleet.Fleet([daemon("producer"), ended], "Valkey"))[0].remedy == "./scripts/scale.sh 1"
    assert [t.remedy for t in fleet.troubles(fleet.Fleet([daemon("producer")], "Valkey"))] == ["./scripts/scale.sh 2"]


def test_why_a_producer_could_not_start_is_told_from_its_log(tmp_path: Path) -> None:
    """The line it ended with; a log that ends with a line of work tells nothing."""
    folder = processes.Folder(tmp_path)
    assert folder.last_words("producer") == ""
    folder.logs.mkdir()
    folder.log_of("producer").write_text('{"message": "x"}\nproducer.py: there is no token file\n')
    folder.log_of("worker-1").write_text('worker.py: no\n{"message": "stopping"}\n')
    assert (folder.last_words("producer"), folder.last_words("worker")) == ("producer.py: there is no token file", "")
    seen = fleet.Fleet([daemon("worker")], "Valkey", last_words={"producer": folder.last_words("producer")})
    assert [trouble.text for trouble in fleet.troubles(seen)] == ["no producer runs (producer.py: there is no token file)"]


def test_a_daemon_whose_pid_file_cannot_be_written_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: nobody would know it, and the next start.sh would start another."""
    folder = processes.Folder(tmp_path / "data")
    folder.run.mkdir(parents=True)
    (folder.run / "worker-1.tmp").mkdir()  # no file can be written there
    (tmp_path / "worker.py").write_text("import time; time.sleep(60)")
    monkeypatch.chdir(tmp_path)
    before = family(os.getpid())
    with pytest.raises(processes.Refused, match=r"worker-1 cannot be started: .*Is a directory: .*worker-1\.tmp.*; make room"):
        folder.launch("worker-1", ())
    assert set(family(os.getpid())) <= set(before)
    assert folder.processes() == []


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9\r\n", b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"a"', b"HTTP/1.1 200 OK\r\n\r\n[]", b""]
)
def test_whoever_answers_in_place_of_a_daemon_is_no_daemon(answer: bytes) -> None:
    """A port that is another program's by now, an answer that ends half-way: status.sh, stop.sh and health_check.sh go on."""
    with socket.create_server(("127.0.0.1", 0)) as stranger, ThreadPoolExecutor() as pool:

        def speak() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        spoken = pool.submit(speak)
        assert fleet.page(f"http://127.0.0.1:{stranger.getsockname()[1]}", "/status")[1] == {}
        spoken.result(20)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["start", "--workers", "2", "--handler", "x:y"],
            "./scripts/start.sh: error: a worker's arguments go after --: ./scripts/start.sh --workers 2 -- --handler x:y\n",
        ),
        (["scale", "-1"], "./scripts/scale.sh: error: argument workers: -1 is no number of workers: 0, 1, 2, …\n"),
        (["status", "x"], "./scripts/status.sh: error: x cannot stand there: ./scripts/status.sh --help tells what can\n"),
        (["stop", "--", "x"], "./scripts/stop.sh: error: -- goes with start.sh and scale.sh only\n"),
    ],
)
def test_a_wrong_argument_names_the_script_and_the_right_line(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the user typed it, never control.py."""
    with pytest.raises(SystemExit):
        control.arguments(argv)
    said = capsys.readouterr().err
    assert said.endswith(expected) and "control.py" not in said


def test_no_workers_is_a_number_and_arguments_of_workers_are_handed_on() -> None:
    given = control.arguments(["scale", "0", "--", "--handler", "x:y"])
    assert (given.workers, given.args) == (0, ["--handler", "x:y"])


def test_one_is_not_many() -> None:
    assert [bulk.counted(number, "dead letter") for number in (0, 1, 2)] == ["0 dead letters", "1 dead letter", "2 dead letters"]


def test_a_process_is_told_from_another_of_its_number(tmp_path: Path) -> None:
    """By when it began and by its command line: this very process is no worker, and a worker that began at another time is not ours."""
    began, command = processes.life_of(os.getpid())
    assert began and "python" in command
    assert not processes.Process("worker-1", os.getpid(), began, ()).alive
    (tmp_path / "worker.py").write_text("input()")
    with subprocess.Popen([sys.executable, tmp_path / "worker.py"], stdin=subprocess.PIPE) as child:
        began = processes.life_of(child.pid)[0]
        assert processes.Process("worker-1", child.pid, began, ()).alive
        assert not processes.Process("worker-1", child.pid, began + "0", ()).alive
        assert not processes.Process("worker-1", child.pid, "", ()).alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.life_of(child.pid) == ("", ""), "a zombie is nobody"
    assert processes.life_of(child.pid) == ("", "")
