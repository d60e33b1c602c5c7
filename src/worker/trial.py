"""What the worker shows instead of running: a handler on one message file, and the plan of a dry run. Changes nothing anywhere."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from config.settings import Settings
from src.common.archive import ref_of
from src.common.circuit_breaker import Breakers, rules_of
from src.common.clock import Clock, iso
from src.common.embedded import existing_redis
from src.common.exceptions import ConfigurationError
from src.common.keys import Keys
from src.common.redis_client import RedisClient, pairs
from src.mail.parse import parse
from src.mail.record import Email, Envelope, hashed_email_id, to_fields
from src.worker.backoff import ceiling
from src.worker.context import Services
from src.worker.delivery import Delivery
from src.worker.idempotency import Done
from src.worker.processor import Handler, Handlers, Outcome, Started, Terms, handle, handle_async, handle_batch
from src.worker.steps import MemoryServices

NEXT = 10  # mails of a plan


def delivery_of(
    raw: bytes, *, now: datetime, account: str = "you@example.org", mailbox: str = "INBOX", labels: Sequence[str] = ()
) -> Delivery:
    """A mail as the stream would deliver it, by the code path of intake."""
    envelope = Envelope(
        account=account,
        mailbox=mailbox,
        uid=1,
        uidvalidity=1,
        internal_date=iso(now),
        size=len(raw),
        email_id=hashed_email_id(account, raw),
        correlation_id="trial",
        ingested_at=iso(now),
        gm_labels=tuple(labels),
        raw_ref=ref_of(raw),
    )
    return Delivery("0-1", 1, to_fields(envelope, parse(raw, envelope)))


def run_once(started: Started, services: Services, terms: Terms, deadline: datetime) -> Outcome:
    """Any kind of handler on one mail, in this thread."""
    match started.handler.kind:
        case "async":
            return asyncio.run(handle_async(started, services, terms, deadline))
        case "batch":
            return handle_batch([started], [services], terms, deadline)[0]
        case _:
            return handle(started, services, terms, deadline)


def print_trial(path: Path, settings: Settings, handlers: Handlers, clock: Clock, out: TextIO) -> int:
    """Run the handler of a message file; exit code 0 where the mail would be done. Raises ConfigurationError for the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"--try {path}: {error.strerror}") from None
    delivery = delivery_of(raw, now=clock.wall())
    handler = handlers.of(delivery.fields)
    email = Email(delivery.fields)
    out.write(
        f"mail      {email.subject or '(no subject)'}, from {email.sender or 'unknown'}, {_count(email.attachments, 'attachment')}\n"
    )
    out.write(f"handler   {handler.spec} ({handler.kind})\n")
    out.flush()
    breakers = Breakers(rules_of(settings.breakers), clock.monotonic, random.random)
    terms = Terms(random.random, settings.stream.result_max_bytes, lambda raw_ref: raw)
    services = MemoryServices(breakers)
    began = clock.monotonic()
    outcome = run_once(Started(delivery, 0, handler), services, terms, clock.wall() + timedelta(seconds=handler.timeout))
    took = clock.monotonic() - began
    out.write("".join(f"{line}\n" for line in _told(outcome, services)))
    out.write(f"time      {took * 1000:.1f} ms\n")
    return 0 if isinstance(outcome, Done) else 1


def _count(items: Sequence[object], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _told(outcome: Outcome, services: MemoryServices) -> list[str]:
    lines = [f"step      {step}: {result}" for step, result in services.steps.items()]
    if isinstance(outcome, Done):
        return [*lines, f"{outcome.outcome:<9} {outcome.result}"]
    lines += [*outcome.traceback.rstrip().splitlines()]
    error = f"{outcome.error_type}: {outcome.error}"
    match outcome.verb:
        case "bury":
            return [*lines, f"dead      at once: {error}"]
        case "postpone":
            return [*lines, f"postponed by {outcome.delay:.1f} s, no attempt counted: {error}"]
        case _:
            return [*lines, f"failed    it would be tried again in {outcome.delay:.1f} s: {error}"]


# a dry run


@dataclass(frozen=True)
class Plan:
    """`next`: the mails that would be read first. Everything else as it is called in the output."""

    handlers: list[dict[str, Any]]
    redis: str
    stream: dict[str, int]
    consumers: list[dict[str, Any]]
    next: list[dict[str, str]]


def print_plan(settings: Settings, handlers: Handlers, out: TextIO) -> int:
    """What a worker would do now: a text on a terminal, else one JSON object. Starts nothing and writes nothing."""
    redis = existing_redis(settings)
    plan = look(settings, handlers, redis)
    if redis:
        redis.close()
    if not out.isatty():
        out.write(json.dumps(plan.__dict__, ensure_ascii=False) + "\n")
        return 0
    for handler in plan.handlers:
        out.write(f"handler   {handler['spec']} ({handler['kind']}){handler['rules']}\n")
        out.write(f"          {handler['attempts']} attempts of {handler['timeout']:g} s at most; {handler['waits']}\n")
    out.write(f"redis     {plan.redis}\n")
    if plan.stream:
        stream = plan.stream
        out.write(
            f"stream    {settings.stream.name}: {stream['unfinished']} unfinished = {stream['in_flight']} in flight + "
            f"{stream['due']} waiting for their next attempt + {stream['unread']} not read; {stream['dead']} dead letters "
            f"(DLQ_MAX {settings.stream.dlq_max})\n"
        )
        out.write(f"group     {settings.stream.group}: {_count(plan.consumers, 'consumer')}\n")
        for consumer in plan.consumers:
            out.write(
                f"          {consumer['name']}: {consumer['pending']} in flight, heard of {consumer['idle_seconds']:.0f} s ago\n"
            )
        for mail in plan.next:
            out.write(
                f"next      {mail['internal_date']:<20}  {mail['from'][:32]:<32}  {mail['subject'][:44]:<44}  → {mail['handler']}\n"
            )
    return 0


def look(settings: Settings, handlers: Handlers, redis: RedisClient | None) -> Plan:
    """Gather it. Raises what RedisClient raises."""
    described = [
        _described(handler, rules)
        for handler, rules in [*((handler, route.rules) for route, handler in handlers.routes), (handlers.default, {})]
    ]
    if redis is None:
        return Plan(described, "no Redis answers", {}, [], [])
    keys, group = Keys(settings.stream.name), settings.stream.group
    groups = [pairs(row) for row in redis.call("XINFO", "GROUPS", keys.stream)] if redis.call("EXISTS", keys.stream) else []
    own = next((row for row in groups if row["name"] == group), None)
    in_flight = int(own["pending"]) if own else 0
    unfinished, due = redis.length(keys.stream), int(redis.call("ZCARD", keys.due))
    stream = {
        "unfinished": unfinished,
        "in_flight": in_flight,
        "due": due,
        "unread": max(0, unfinished - in_flight - due),
        "dead": redis.length(keys.dlq),
    }
    rows = [pairs(row) for row in redis.call("XINFO", "CONSUMERS", keys.stream, group)] if own else []
    consumers = [{"name": row["name"], "pending": int(row["pending"]), "idle_seconds": int(row["idle"]) / 1000} for row in rows]
    unread = redis.entries(keys.stream, f"({own['last-delivered-id']}" if own else "-", count=NEXT)
    shown = ("email_id", "internal_date", "from", "subject")
    following = [{**{name: fields.get(name, "") for name in shown}, "handler": handlers.of(fields).spec} for _, fields in unread]
    return Plan(described, "answers", stream, consumers, following)


def _described(handler: Handler, rules: dict[str, Any]) -> dict[str, Any]:
    policy = handler.policy
    delays = [ceiling(attempt, policy) for attempt in range(1, policy.attempts)]
    waits = ", ".join(f"{delay:g}" for delay in delays[:12]) + (", …" if len(delays) > 12 else "")
    share = "" if policy.jitter == 0 else "up to "
    return {
        "spec": handler.spec,
        "kind": handler.kind,
        "rules": "".join(f", {name} {value}" for name, value in rules.items()),
        "attempts": policy.attempts,
        "timeout": handler.timeout,
        "waits": f"between them {share}{waits} s" if delays else "no second one",
    }
