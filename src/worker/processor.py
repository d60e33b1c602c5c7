"""The user's code: loaded and checked once, called for each mail; and the built-in handler that runs without any.

Whatever a handler does, each of its mails ends in a Done or a Failure: `handle` for one mail, `handle_async` for one of an
async handler, `handle_batch` for many. None of them touches Redis, threads or the clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

from config.routes import Route
from config.settings import WorkSettings
from src.common import tracing
from src.common.correlation import correlated
from src.common.exceptions import ConfigurationError, Permanent, SkipEmail
from src.mail.record import Email
from src.worker.backoff import Policy, decide
from src.worker.context import Context, Services, encoded
from src.worker.delivery import Delivery
from src.worker.dlq import Failure
from src.worker.idempotency import Done

HANDLER_LOG = logging.getLogger("handler")
TRACEBACK_FRAMES = 20

Outcome = Done | Failure
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, eq=False)
class Handler:
    """A loaded handler. `kind`: called with one mail, awaited with one mail, or called with a list of mails. `timeout` in seconds."""

    spec: str
    call: Callable[..., Any]
    kind: Literal["plain", "async", "batch"]
    policy: Policy
    timeout: float


class Started(NamedTuple):
    """A mail whose handler is to run now. `attempts`: failed ones so far. `alone`: a suspect, to run in a process of its own."""

    delivery: Delivery
    attempts: int
    handler: Handler
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every mail of a worker. `chance`: a number in [0, 1). `fetch_raw`: raw_ref → raw mail; None without an archive."""

    chance: Callable[[], float]
    result_max: int
    fetch_raw: Callable[[str], bytes] | None = None


# load


@dataclass(frozen=True)
class Handlers:
    """`default` handles what no route matches."""

    routes: tuple[tuple[Route, Handler], ...]
    default: Handler

    def of(self, fields: Mapping[str, str]) -> Handler:
        """The handler of a stream entry: that of the first route whose rules all hold."""
        if not self.routes:
            return self.default
        email = Email(fields)
        return next((handler for route, handler in self.routes if matches(route, email)), self.default)

    @property
    def all(self) -> tuple[Handler, ...]:
        return (*(handler for _, handler in self.routes), self.default)


def matches(route: Route, email: Email) -> bool:
    """Whether all rules of `route` hold. A rule about a record that cannot be decoded does not."""
    try:
        return (
            (route.mailbox is None or email.mailbox in route.mailbox)
            and (route.label is None or not set(route.label).isdisjoint(email.labels))
            and (route.sender_domain is None or _of_domain(email.sender.address, route.sender_domain))
            and (route.keyword is None or _mentions(email, route.keyword))
            and (route.is_auto is None or email.is_auto == route.is_auto)
        )
    except ValueError:
        return False


def _of_domain(address: str, domains: Sequence[str]) -> bool:
    domain = address.rpartition("@")[2].lower()
    return any(domain == wanted.lower() or domain.endswith(f".{wanted.lower()}") for wanted in domains)


def _mentions(email: Email, keywords: Sequence[str]) -> bool:
    text = f"{email.subject}\n{email.text}".casefold()
    return any(keyword.casefold() in text for keyword in keywords)


def load_handlers(work: WorkSettings, routes: Sequence[Route]) -> Handlers:
    """The handlers of HANDLERS_FILE and WORKER_HANDLER, imported, checked and prepared. Raises ConfigurationError with the reason."""
    loaded = tuple((route, _handler(work, route.handler, f"{work.handlers_file}: {route.handler}", route)) for route in routes)
    spec = work.handler
    default = _handler(work, spec, f"WORKER_HANDLER={spec}", Route(handler=spec or "src.worker.processor:summarize"))
    return Handlers(loaded, default)


def _handler(work: WorkSettings, spec: str | None, title: str, route: Route) -> Handler:
    call, kind = load_handler(spec, title)

    policy = Policy(
        _first(route.max_attempts, work.max_attempts),
        _first(route.backoff_base, work.backoff_base),
        _first(route.backoff_factor, work.backoff_factor),
        _first(route.backoff_cap, work.backoff_cap),
        _first(route.backoff_jitter, work.backoff_jitter),
    )
    return Handler(route.handler, call, kind, policy, _first(route.timeout, work.handler_timeout))


def _first(own: Number | None, common: Number) -> Number:
    return common if own is None else own


def load_handler(spec: str | None, title: str) -> tuple[Callable[..., Any], Literal["plain", "async", "batch"]]:
    """`package.module:function` or `path/to/file.py:function` → the function and its kind. `title`: what an error begins with.

    A function whose first parameter is called `emails` takes batches. Raises ConfigurationError with the reason.
    """
    if spec is None:
        return summarize, "plain"
    place, _, name = spec.rpartition(":")
    try:
        module = _module(place)
    except (Exception, SystemExit) as error:  # user code: importing it may raise anything
        raise ConfigurationError(
            f"{title}: cannot import {place} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigurationError(f"{title}: {place} has no function {name}")
    try:
        signature = inspect.signature(function)
        signature.bind(None, None)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{title}: {name} must take (email, context), or (emails, contexts) for batches") from None
    batch = next(iter(signature.parameters)) == "emails"
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if batch and asynchronous:
        raise ConfigurationError(f"{title}: {name} takes batches, so it must be a plain function, not async")
    prepare = getattr(module, "prepare", None)
    if callable(prepare):
        prepare()  # a handler's own start: settings, connections; ConfigurationError ends the worker with exit code 2
    return function, "batch" if batch else "async" if asynchronous else "plain"


def _module(place: str) -> ModuleType:
    """A module that can be imported, or a file: named by its path, or as a module that stands in the working directory."""
    path = Path(place) if place.endswith(".py") else Path(*place.split(".")).with_suffix(".py")
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name != place.partition(".")[0] or not path.is_file():
                raise
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path.resolve()):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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


# handle


def handle(started: Started, services: Services, terms: Terms, deadline: datetime) -> Outcome:
    """Run a plain handler on one mail and decide what becomes of it. Raises nothing of the handler's."""
    email, context = _told(started, services, terms, deadline)
    with correlated(started.delivery.correlation_id):
        try:
            with _span(started, email):
                return done(started, started.handler.call(email, context), terms)
        except BaseException as error:  # noqa: BLE001  # the handler's edge: whatever it raises is its mail's fate
            return settled(started, error, terms)


async def handle_async(started: Started, services: Services, terms: Terms, deadline: datetime) -> Outcome:
    """The same for an async handler. Being cancelled from outside is its mail's fate too: the caller knows that it did it."""
    email, context = _told(started, services, terms, deadline)
    with correlated(started.delivery.correlation_id):
        try:
            with _span(started, email):
                return done(started, await started.handler.call(email, context), terms)
        except BaseException as error:  # noqa: BLE001  # as above
            return settled(started, error, terms)


def handle_batch(batch: Sequence[Started], services: Sequence[Services], terms: Terms, deadline: datetime) -> list[Outcome]:
    """Run a batch handler: it returns one verdict a mail, a dict or None (done) or an exception (what it raised for that mail).

    Where it raises itself, every mail of the batch has failed; at their next attempts they come one by one.
    """
    told = [_told(started, service, terms, deadline) for started, service in zip(batch, services, strict=True)]
    try:
        verdicts = batch[0].handler.call([email for email, _ in told], [context for _, context in told])
        if not isinstance(verdicts, (list, tuple)) or len(verdicts) != len(batch):
            raise Permanent(f"a batch handler returns one verdict a mail: a list of {len(batch)}, not {_described(verdicts)}")
        return [_judged(started, verdict, terms) for started, verdict in zip(batch, verdicts, strict=True)]
    except BaseException as error:  # noqa: BLE001  # as above
        return [settled(started, error, terms) for started in batch]


def _described(value: object) -> str:
    return f"one of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


def _judged(started: Started, verdict: object, terms: Terms) -> Outcome:
    try:
        return settled(started, verdict, terms) if isinstance(verdict, BaseException) else done(started, verdict, terms)
    except BaseException as error:  # noqa: BLE001  # as above: what it returned may be of any class
        return settled(started, error, terms)


def _span(started: Started, email: Email) -> AbstractContextManager[object]:
    """A span of the mail's own trace, where somebody collects spans; else nothing, and its record is not decoded for it."""
    if not tracing.enabled():
        return nullcontext()
    delivery = started.delivery
    return tracing.span(
        "handle",
        email.traceparent,
        email_id=delivery.email_id,
        correlation_id=delivery.correlation_id,
        handler=started.handler.spec,
        attempt=started.attempts + 1,
    )


def _told(started: Started, services: Services, terms: Terms, deadline: datetime) -> tuple[Email, Context]:
    delivery = started.delivery
    email = Email(delivery.fields, terms.fetch_raw)
    log = logging.LoggerAdapter(HANDLER_LOG, {"correlation_id": delivery.correlation_id})
    context = Context(delivery.email_id, started.attempts + 1, delivery.replays, deadline, log, email, services, terms.result_max)
    return email, context


def done(started: Started, result: object, terms: Terms) -> Done:
    """A handler returned `result`. Raises Permanent where that cannot be kept: repeating the handler would not change it."""
    if result is not None and not isinstance(result, dict):
        raise Permanent(f"the handler returned {type(result).__name__}; it returns a dict or None")
    text = encoded(result, terms.result_max, "the handler's result") if result else "{}"
    return Done(started.delivery, "done", text, started.handler.spec)


def settled(started: Started, error: BaseException, terms: Terms) -> Outcome:
    """What becomes of a mail for which the handler raised `error`; of any class, so looking at it may fail too."""
    try:
        return _settled(started, error, terms)
    except BaseException as broken:  # noqa: BLE001  # as above
        seen = f"{type(error).__name__} cannot be looked at: that raises {type(broken).__name__}"
        return _settled(started, RuntimeError(seen), terms)


def _settled(started: Started, error: BaseException, terms: Terms) -> Outcome:
    if isinstance(error, SkipEmail):
        reason = _words(error)[:500].encode(errors="replace").decode()
        return Done(started.delivery, "skipped", json.dumps({"reason": reason}, ensure_ascii=False), started.handler.spec)
    decision = decide(error, started.attempts, started.handler.policy, terms.chance())
    frames = "".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES))
    return Failure(
        started.delivery,
        decision.verb,
        decision.delay,
        decision.reason,
        type(error).__name__,
        _words(error),
        frames,
        started.handler.spec,
    )


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001  # still the handler's code: its error's own __str__
        return f"(str() of the error raised {type(broken).__name__})"
