"""The user's code: loaded and checked once, called for each mail; and the built-in handler that runs without any."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from src.common.correlation import correlated
from src.common.exceptions import ConfigurationError, Permanent, SkipEmail
from src.mail.record import Email
from src.worker.backoff import Policy, decide
from src.worker.delivery import Delivery
from src.worker.dlq import Failure
from src.worker.idempotency import Done

TRACEBACK_FRAMES = 20


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler is told beside the mail.

    idempotency_key: stable for this mail, whoever delivers it how often: hand it to outside systems. attempt: from 1.
    replays: how often the mail came back from the dead letters. log: its lines carry the mail's correlation id.
    """

    idempotency_key: str
    attempt: int
    replays: int
    log: logging.Logger


Handler = Callable[[Email, Context], dict[str, Any] | None]


def load_handler(spec: str | None) -> Handler:
    """`package.module:function` → the function. Raises ConfigurationError with the reason."""
    if spec is None:
        return summarize
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # user code: importing it may raise anything
        raise ConfigurationError(
            f"WORKER_HANDLER={spec}: cannot import {module_name} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    handler = getattr(module, name, None)
    if not callable(handler):
        raise ConfigurationError(f"WORKER_HANDLER={spec}: {module_name} has no function {name}")
    if inspect.iscoroutinefunction(handler):
        raise ConfigurationError(f"WORKER_HANDLER={spec}: {name} is async; a handler is a plain function for now")
    try:
        inspect.signature(handler).bind(None, None)
    except TypeError:
        raise ConfigurationError(f"WORKER_HANDLER={spec}: {name} must take (email, context)") from None
    prepare = getattr(module, "prepare", None)
    if callable(prepare):
        prepare()  # a handler's own start: settings, connections; ConfigurationError ends the worker with exit code 2
    return handler  # type: ignore[no-any-return]  # what it returns is checked at each call


def summarize(email: Email, context: Context) -> dict[str, Any]:
    """The built-in handler: one log line and a summary as the result."""
    context.log.info("mail from %s: %s", email.sender.address or "unknown", email.subject or "(no subject)")
    return {
        "from": email.sender.address,
        "subject": email.subject,
        "text_characters": len(email.text),
        "attachments": len(email.attachments),
        "defects": list(email.defects),
    }


def handle(
    handler: Handler,
    delivery: Delivery,
    attempts: int,
    *,
    policy: Policy,
    chance: Callable[[], float],
    result_max: int,
    fetch_raw: Callable[[str], bytes] | None = None,
) -> Done | Failure:
    """Run `handler` on one mail and decide what becomes of it. `attempts`: failed ones so far. Raises nothing of the handler's.

    `fetch_raw`: raw_ref → raw mail; None where no archive is kept.
    """
    context = Context(delivery.email_id, attempts + 1, delivery.replays, logging.getLogger("handler"))
    with correlated(delivery.correlation_id):
        try:
            return Done(delivery, "done", encoded(handler(Email(delivery.fields, fetch_raw), context), result_max))
        except SkipEmail as error:
            return Done(delivery, "skipped", encoded({"reason": _words(error)[:500]}, result_max))
        except BaseException as error:  # noqa: BLE001  # the handler's edge: whatever it raises (also asyncio.CancelledError) is its mail's fate
            decision = decide(error, attempts, policy, chance())
            frames = "".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES))
            return Failure(delivery, decision.verb, decision.delay, decision.reason, type(error).__name__, _words(error), frames)


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001  # still the handler's code: its error's own __str__
        return f"(str() of the error raised {type(broken).__name__})"


def encoded(result: object, most: int) -> str:
    """A handler's result as JSON of at most `most` bytes. Raises Permanent: repeating the handler would not change it."""
    if result is None:
        return "{}"
    if not isinstance(result, dict):
        raise Permanent(f"the handler returned {type(result).__name__}; it returns a dict or None")
    try:
        text = json.dumps(result, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError) as error:
        raise Permanent(f"the handler's result is not JSON: {error}") from error
    if size > most:
        raise Permanent(f"the handler's result has {size} bytes of JSON; RESULT_MAX_BYTES is {most}")
    return text
