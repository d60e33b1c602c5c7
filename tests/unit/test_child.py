"""A process for handlers: what it asks, and for which mail."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from config.routes import Route
from config.settings import load_settings
from src.common.circuit_breaker import Breakers, Rules
from src.worker.child import Child, Job
from src.worker.delivery import Delivery
from src.worker.idempotency import Done
from src.worker.steps import MemoryServices
from tests.support.fake import fields_of

LEAVES_A_THREAD = """
import threading

next_mail = threading.Event()
threads, said = [], []

def handle(email, context):
    if email.subject == "first":
        def late():
            next_mail.wait(20)
            try:
                context.once("charge", lambda: "the first was charged")
            except Exception as error:
                said.append(type(error).__name__)
        threads.append(threading.Thread(target=late))
        threads[0].start()
        return {}
    next_mail.set()
    threads[0].join(20)
    return {"late": said, "charge": context.once("charge", lambda: "the second was charged")}
"""


def test_a_thread_that_a_handler_left_behind_records_no_step_of_the_next_mail(tmp_path: Path) -> None:
    """It gets LeaseLost; the step is the second mail's own."""
    module = tmp_path / "leaves.py"
    module.write_text(LEAVES_A_THREAD)
    settings = load_settings({"WORKER_HANDLER": f"{module}:handle", "RAW_ARCHIVE": "off"}, env_file=None)
    breakers = Breakers(Rules(), time.monotonic, lambda: 1.0)
    child = Child(settings, list[Route]())
    try:
        assert child.ready() is None
        outcomes, steps = [], []
        for number, subject in enumerate(("first", "second"), start=1):
            mail = Delivery(f"{number}-0", 1, fields_of(f"gm:a:{number}", subject=subject))
            job = Job(((mail, 0),), 0, datetime.now(UTC) + timedelta(seconds=60))
            services = MemoryServices(breakers)
            answer = child.run(job, [services], 60.0, time.monotonic)
            assert isinstance(answer, list), answer
            outcomes += answer
            steps.append(services.steps)
    finally:
        child.kill()
    assert steps == [{}, {"charge": '"the second was charged"'}]
    assert [outcome.result for outcome in outcomes if isinstance(outcome, Done)] == [
        "{}",
        '{"late":["LeaseLost"],"charge":"the second was charged"}',
    ]
