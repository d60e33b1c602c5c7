"""What a worker knows, under the names of its metrics. Asks nobody."""

from __future__ import annotations

from src.monitoring.metrics import Numbers
from src.worker.consume import Consumer
from src.worker.runners import Runners

_COUNTED = {
    "started": "started",
    "done": "done",
    "retried": "retried",
    "postponed": "postponed",
    "duplicates": "duplicates",
    "leases_lost": "lost",
    "recovered": "recovered",
    "expired": "expired",
}


def of_work(consumer: Consumer, runners: Runners, *, joined: bool) -> Numbers:
    """`joined`: it is in its group."""
    return {
        **{f"email_worker_{name}_total": consumer.counts[counted] for name, counted in _COUNTED.items()},
        "email_worker_dead_total": {(error,): count for error, count in dict(consumer.dead).items()},
        "email_worker_handler_seconds": {(handler,): took for handler, took in runners.took.items()},
        "email_worker_intake_to_done_seconds": consumer.way,
        "email_worker_in_flight_mails": consumer.in_flight(),
        "email_worker_oldest_in_flight_seconds": consumer.oldest(),
        "email_worker_reading": float(joined and not consumer.blocked),
    }
