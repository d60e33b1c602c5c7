"""docs/handlers.md: its examples are run as they stand there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from config.routes import load_routes
from config.settings import load_settings
from src.common.circuit_breaker import Breakers, Rules
from src.worker.idempotency import Done
from src.worker.processor import Started, Terms, load_handlers
from src.worker.steps import MemoryServices
from src.worker.trial import delivery_of, run_once
from tests.support.daemons import ROOT

PAGE = (ROOT / "docs" / "handlers.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, flags=re.DOTALL))
NOW = datetime(2026, 1, 31, tzinfo=UTC)
INVOICE = "From: Billing <billing@supplier.example>\nSubject: Invoice 17\n\nPlease pay."


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each Python block as a file of the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, code in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(code)
    yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(name, None)


def run(spec: str, message: str, attempts: int = 0, services: MemoryServices | None = None) -> str:
    """How the handler of the page ends with this mail: its result, or verb and error."""
    handler = load_handlers(load_settings({"WORKER_HANDLER": spec}, env_file=None).work, ()).default
    started = Started(delivery_of(message.encode(), now=NOW), attempts, handler)
    outcome = run_once(started, services or fresh_services(), Terms(lambda: 0.0, 65_536), NOW)
    return outcome.result if isinstance(outcome, Done) else f"{outcome.verb} {outcome.error}"


def fresh_services() -> MemoryServices:
    return MemoryServices(Breakers(Rules(), lambda: 0.0, lambda: 1.0))


def test_every_python_block_is_run_here() -> None:
    """A block that is added needs its test."""
    assert sorted(BLOCKS) == ["async_handler", "batch_handler", "booking", "crm", "my_handler", "test_mine"]
    assert PAGE.count("```python") == len(BLOCKS)


def test_ten_lines() -> None:
    assert run("my_handler:handle", INVOICE) == '{"invoice":true,"attachments":[]}'
    bounce = "From: MAILER-DAEMON@example.org\nContent-Type: multipart/report; report-type=delivery-status; boundary=b\n\n--b--\n"
    assert run("my_handler:handle", bounce) == "bury a bounce is nobody's invoice"


def test_a_step_is_not_repeated() -> None:
    services = fresh_services()
    assert run("booking:handle", INVOICE, 0, services) == "retry the chat is away, this once"
    assert run("booking:handle", INVOICE, 1, services) == '{"number":1}'


def test_a_breaker_opens() -> None:
    services = fresh_services()
    ends = [run("crm:handle", INVOICE, 0, services).partition(" ")[0] for _ in range(6)]
    assert ends == ["retry"] * 5 + ["postpone"]


def test_async_and_batches() -> None:
    assert run("async_handler:handle", INVOICE) == '{"subject":"Invoice 17"}'
    assert run("batch_handler:handle_batch", INVOICE) == "retry not known yet"
    assert run("batch_handler:handle_batch", "From: ann@example.org\n\n") == '{"known":true}'


def test_users_tests_pass(files: Path) -> None:
    """The block of tests, run as tests."""
    scope: dict[str, object] = {}
    exec(compile(BLOCKS["test_mine"], "test_mine.py", "exec"), scope)
    tests = [test for name, test in scope.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_file_of_handlers(files: Path) -> None:
    """It is valid, and routes as the page says."""
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    (files / "handlers.toml").write_text(text)
    (files / "invoices.py").write_text("def handle(email, context): return {}")
    (files / "tickets.py").write_text("def handle(email, context): return {}")
    routes = load_routes(files / "handlers.toml")
    handlers = load_handlers(load_settings({}, env_file=None).work, routes)
    try:
        for message, mailbox, spec in (
            (INVOICE, "INBOX", "invoices:handle"),
            ("From: a@b.example\n\n", "Support", "tickets.py:handle"),
            ("From: a@b.example\n\n", "INBOX", "src.worker.processor:summarize"),
        ):
            assert handlers.of(delivery_of(message.encode(), now=NOW, mailbox=mailbox).fields).spec == spec
    finally:
        sys.modules.pop("invoices", None)
        sys.modules.pop("tickets", None)
