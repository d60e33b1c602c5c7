"""scripts/lib.sh: what the scripts set up, against a .venv whose pip is a script of ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SATISFIED = "echo 'Requirement already satisfied: redis==8.1.0'"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose interpreter notes each call of pip in `calls`, and does what `pip` says."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    for name in ("lib.sh", "status.sh", "start.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts" / "control.py").touch()
    (tmp_path / "requirements.txt").write_text("redis==8.1.0\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *"pip install"*) echo "$@" >>calls; . ./pip;; *control.py*) echo "$@";; esac\n')
    python.chmod(0o755)
    return tmp_path


def run(project: Path, script: str, pip: str) -> tuple[int, str]:
    (project / "pip").write_text(pip)
    done = subprocess.run([project / "scripts" / script], cwd=project, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_packages_that_are_all_there_are_no_failure(project: Path) -> None:
    """A .venv made by hand, where pip has nothing to say but that: what is started starts, and the next time at once."""
    code, output = run(project, "start.sh", SATISFIED)
    assert (code, output.splitlines()[-1]) == (0, "scripts/control.py start")
    run(project, "start.sh", SATISFIED)
    assert len((project / "calls").read_text().splitlines()) == 1


def test_packages_that_cannot_be_had_are_one(project: Path) -> None:
    """pip's own verdict counts, whatever of its output is shown."""
    code, output = run(project, "start.sh", f"{SATISFIED}; echo 'ERROR: no'; exit 1")
    assert code == 1
    assert "ERROR: no\nstart.sh: the packages could not be installed: see above\n" in output


def test_what_only_looks_installs_nothing_under_daemons_that_run(project: Path) -> None:
    """status.sh, by another user than the one who made the .venv, or after a git pull."""
    assert run(project, "status.sh", "exit 1") == (0, "scripts/control.py status\n")
    assert not (project / "calls").exists()
