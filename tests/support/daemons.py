"""The daemons as a user starts them: the real file, a clean environment, signals."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import ChildProcess
from tests.support.wait import until

ROOT = Path(__file__).resolve().parents[2]


class Daemon:
    """`python producer.py …` or `python worker.py …`, started on entering the context, killed on leaving it.

    `script` is a path from the repository's root. `tmp` is its HOME and its working directory, so that the developer's own
    `.env`, `data/` and `tokens/` stay out of it; of the caller's environment only PATH is handed on. When the context is
    left by an exception, the last 60 lines of the output are printed.
    """

    def __init__(self, script: str, *args: str, env: Mapping[str, str], tmp: Path) -> None:
        self._argv = [sys.executable, str(ROOT / script), *args]
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "METRICS_PORT": "off",  # or every producer of a test asks for 9090
            **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")},
            **env,
        }
        self._tmp = tmp
        name = Path(script).name
        self._log = tmp / f"{name}.{len(list(tmp.glob(f'{name}.*.log')))}.log"
        self._process: ChildProcess | None = None

    def __enter__(self) -> Self:
        self._process = ChildProcess(self._argv, log=self._log, env=self._env, cwd=self._tmp)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._running().kill()
        if kind is not None:
            print(f"--- {' '.join(self._argv[1:])}: last lines\n{self._running().tail(60)}\n---")

    @property
    def pid(self) -> int:
        return self._running().pid

    def running(self) -> bool:
        return self._running().running()

    def output(self) -> str:
        """All it has written to stdout and stderr so far."""
        return self._running().output()

    def wait_for(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """Wait until the output holds `pattern` (a regular expression); raises AssertionError at once when it ends without."""

        def found() -> re.Match[str] | None:
            ended = not self.running()
            match = re.search(pattern, self.output())
            assert match or not ended, f"ended before writing {pattern!r}:\n{self._running().tail()}"
            return match

        match = until(found, timeout, f"{self._argv[1]} writes {pattern!r}")
        assert match is not None
        return match

    def exit_code(self, timeout: float = 20.0) -> int:
        """Wait for its end; negative: ended by that signal."""
        return self._running().wait(timeout)

    def terminate(self, timeout: float = 40.0) -> int:
        """SIGTERM (to the daemon alone), then its exit code."""
        self.send(signal.SIGTERM)
        return self.exit_code(timeout)

    def send(self, number: signal.Signals) -> None:
        self._running().send(number)

    def send_group(self, number: signal.Signals) -> None:
        """To the daemon and all it has started, as a terminal and a service manager do."""
        self._running().send_group(number)

    def kill9(self) -> None:
        """SIGKILL to the daemon and what it started in its group."""
        self._running().kill()

    def freeze(self) -> None:
        self._running().send_group(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().send_group(signal.SIGCONT)

    def _running(self) -> ChildProcess:
        assert self._process is not None, "enter the context first"
        return self._process
