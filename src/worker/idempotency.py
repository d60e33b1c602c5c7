"""begin and complete: the two transitions between which a handler runs, and the processed sets that make its mail count once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from src.common.archive import raw_ref_in
from src.common.clock import iso
from src.worker.delivery import Delivery, Seat, numbered, place_of

DEATH = 4  # suspicion: a solo start, and the death of its process

Verdict = Literal["GO", "SUSPECT", "DUP", "LOST", "POISON"]
Settled = Literal["OK", "ALREADY", "LOST"]


class Begun(NamedTuple):
    """`attempts`: failed attempts so far."""

    verdict: Verdict
    attempts: int


class Done(NamedTuple):
    """`outcome`: done | skipped. `result`: JSON. `steps`: steps of the mail may be kept (`context.once`): they have an end now."""

    delivery: Delivery
    outcome: str
    result: str
    handler: str = ""
    steps: bool = False


def begin(seat: Seat, mails: Sequence[Delivery], *, solo: bool, poison: int, now: datetime) -> list[Begun]:
    """Mark each mail as started, in one round trip; one answer a mail.

    GO: run the handler. SUSPECT: its last start never finished; begin it again with `solo` when it can run in a process of its own. DUP:
    done before, acknowledged now. LOST: no longer ours. POISON: buried now, its suspicion has reached `poison` (DEATH for each time
    that its own process died, 1 for each time that the worker died around it).
    """
    places = [place_of(seat.keys, mail.fields) for mail in mails]
    sets, number = numbered(place.processed for place in places)
    keys = seat.keys
    args: list[str | int] = [seat.group, seat.consumer, poison, int(solo), iso(now)]
    for mail, place in zip(mails, places, strict=True):
        args += [mail.stream_id, mail.count, place.email_id, place.member, number[place.processed], place.open_field]
    reply = seat.redis.run("begin", [keys.stream, keys.index, keys.starts, keys.tries, keys.dlq, keys.open, *sets], args)
    return [Begun(verdict, int(attempts)) for verdict, attempts in reply]


def complete(seat: Seat, done: Sequence[Done], *, processed_days: float, results_max: int, results_days: float) -> list[Settled]:
    """Write result and processed id, acknowledge and delete, in one round trip; one answer a mail. Safe to repeat."""
    places = [place_of(seat.keys, mail.delivery.fields) for mail in done]
    sets, number = numbered(place.processed for place in places)
    keys = seat.keys
    script_keys = [keys.stream, keys.index, keys.starts, keys.tries, keys.results, keys.open, *sets]
    args: list[str | int] = [seat.group, seat.consumer, round(processed_days * 86_400), results_max, round(results_days * 86_400)]
    for (delivery, outcome, result, handler, steps), place in zip(done, places, strict=True):
        fields = delivery.fields
        args += [delivery.stream_id, delivery.count, place.email_id, place.member, number[place.processed], place.open_field]
        args += [outcome, result, handler, fields["mailbox"], fields.get("uid", ""), fields["internal_date"]]
        if steps:
            script_keys.append(keys.steps(place.email_id))
        args += [fields.get("from", ""), raw_ref_in(fields["record"]), delivery.correlation_id, len(script_keys) if steps else 0]
    return list(seat.redis.run("complete", script_keys, args))
