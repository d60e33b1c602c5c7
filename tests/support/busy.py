"""The real daemons at work, a Prometheus that watches them, and trouble to order."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from src.common.exceptions import Permanent
from src.mail.record import Email
from src.sandbox.server import Sandbox
from src.worker.context import Context
from tests.support.daemons import Daemon
from tests.support.pipeline import Pipeline
from tests.support.processes import free_port
from tests.support.prometheus import Prometheus
from tests.support.servers import RedisServer

REVOKED = "bob@example.org"
CONSENT_AGE = timedelta(days=6.5)
ALONE = threading.Event()  # waiting for it is how a handler takes its time


def handle(email: Email, context: Context) -> dict[str, Any]:
    """The subject is the order: `slow MS`; `fail N`, in the first N attempts; `permanent`; `crm`, which calls something that is down
    while the file `crm-is-down` is there."""
    order, _, argument = email.subject.partition(" ")
    if order == "permanent":
        raise Permanent("buried as ordered")
    if order == "fail" and context.attempt <= int(argument):
        raise RuntimeError("fails as ordered")
    if order == "slow":
        ALONE.wait(int(argument) / 1000)
    if order == "crm":
        with context.breaker("crm"):
            if Path(os.environ["CRM_IS_DOWN"]).exists():
                raise ConnectionError("the CRM does not answer")
    return {}


class Busy:
    """One producer of two accounts, one of which has a dead token; two workers; Prometheus. `pipeline`: to deliver mail to."""

    def __init__(self, *, dead_letters_max: int = 10) -> None:
        self.dead_letters_max = dead_letters_max

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="busy-")))
            self.sandbox = stack.enter_context(Sandbox())
            self.redis = stack.enter_context(RedisServer("valkey", options={"maxmemory": "64mb"}))
            self._crm_is_down = folder / "crm-is-down"
            self.pipeline = pipeline = Pipeline(
                self.sandbox,
                self.redis,
                folder,
                WORKER_HANDLER="tests.support.busy:handle",
                CRM_IS_DOWN=str(self._crm_is_down),
                DLQ_MAX=str(self.dead_letters_max),
                DAILY_BYTES="1000000",
                RELIST_INTERVAL="1",
                BREAKER_FAILURES="3",
                BREAKER_OPEN_SECONDS="1",
                BREAKER_OPEN_CAP="2",
                RAW_ARCHIVE="off",
            )
            pipeline.write_token(REVOKED)
            self.sandbox.revoke(REVOKED)
            _let_it_age(folder / "tokens" / f"{pipeline.account}.json")
            self._workers = stack.enter_context(ExitStack())
            self.workers = [self.start_worker(), self.start_worker()]
            for worker in self.workers:  # the producer looks who is there as it starts, and then every 10 s
                worker.wait_for("reads email_ingestion_stream")
            port = free_port()
            accounts = f"{pipeline.account},{REVOKED}"
            self.producer = stack.enter_context(pipeline.producer(HTTP_PORT=str(port), GMAIL_USERNAME=accounts))
            self.producer.wait_for("health: ")
            self.prometheus = stack.enter_context(Prometheus(port))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def start_worker(self) -> Daemon:
        return self._workers.enter_context(self.pipeline.worker())

    def crm(self, *, down: bool) -> None:
        if down:
            self._crm_is_down.touch()
        else:
            self._crm_is_down.unlink()


def _let_it_age(path: Path) -> None:
    """The consent of this token file was given `CONSENT_AGE` ago."""
    token = json.loads(path.read_text())
    token["obtained_at"] = (datetime.now(UTC) - CONSENT_AGE).strftime("%Y-%m-%dT%H:%M:%SZ")
    path.write_text(json.dumps(token))
