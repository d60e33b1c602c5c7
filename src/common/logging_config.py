"""Logs: one line an event, JSON for machines or text for a terminal, the correlation id in each."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

from pythonjsonlogger.json import JsonFormatter

from src.common import correlation

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "correlation_id", "taskName"}


class _Correlation(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.correlation_id = getattr(record, "correlation_id", "") or correlation.current()
        return True


class TextFormatter(logging.Formatter):
    """`18:42:27 INFO    message  key=value`, on one line whatever the message holds: a subject cannot forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        extra = [f"{name}={value}" for name, value in vars(record).items() if name not in STANDARD]
        if record.__dict__.get("correlation_id"):
            extra.append(f"correlation_id={record.__dict__['correlation_id']}")
        line = f"{moment} {record.levelname:<7} {record.getMessage()}" + ("  " + " ".join(extra) if extra else "")
        lines = [line, *(f"  {part}" for part in self._stacks(record))]  # indented: no line of it can pass for one of the log
        return "\n".join("".join(char if char.isprintable() else repr(char)[1:-1] for char in part) for part in lines)

    def _stacks(self, record: logging.LogRecord) -> list[str]:
        stacks = [self.formatException(record.exc_info)] if record.exc_info else []
        stacks += [record.stack_info] if record.stack_info else []
        return [part for stack in stacks for part in stack.splitlines()]


def configure(log_format: Literal["auto", "json", "text"], level: str, stream: TextIO = sys.stderr) -> None:
    """Send every log line of the process to `stream`."""
    text = log_format == "text" or (log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Correlation())
    handler.setFormatter(
        TextFormatter()
        if text
        else JsonFormatter(
            "%(levelname)s %(name)s %(message)s %(correlation_id)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp=True,
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for chatty in ("imapclient", "urllib3", "google", "uvicorn", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
