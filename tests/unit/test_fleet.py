"""scripts/_fleet.py: what counts as trouble, how bad it is, and what to run. Pure."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.modules["_path"] = importlib.import_module("scripts._path")  # its own folder is not on our path
processes = sys.modules["_processes"] = importlib.import_module("scripts._processes")
fleet = importlib.import_module("scripts._fleet")

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
