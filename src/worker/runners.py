"""Where handlers run: threads of the worker, processes of their own, an event loop, and one process for suspects.

Each gets mails that are begun, and gives each of them one outcome. What takes longer than its handler's time-out has failed: a
process is killed, a task is cancelled, a thread cannot be stopped and is left to itself, with another one in its place.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

from src.common.clock import Clock
from src.common.exceptions import Fatal, IngestionError
from src.common.shutdown import Shutdown
from src.common.timing import WORK, Histogram
from src.worker.backoff import decide
from src.worker.child import Child, Ended, Job
from src.worker.consume import Consumer
from src.worker.dlq import Failure
from src.worker.processor import Handler, Outcome, Started, handle_async, handle_batch, settled
from src.worker.steps import LocalServices

log = logging.getLogger(__name__)

FAST_HANDLER = 0.010  # seconds
IDLE_SECONDS = 5.0  # a process for suspects that has none ends after so long

Settle = Callable[[Outcome], None]


class HandlerTimeout(IngestionError):
    """A handler took longer than its time-out."""


class ProcessDied(IngestionError):
    """The process that a handler ran in is gone."""


@dataclass
class Turn:
    """One call of a handler in a thread. `given_up`: it took too long; whatever comes of it is ignored."""

    mails: Sequence[Started]
    began: float
    thread: int
    given_up: bool = False


@dataclass
class Runners:
    """All places of one worker. `hand_on`: takes an outcome from any thread. `new_child`: a process with the handlers, not yet ready.

    `in_processes`: handlers run in processes, one to a thread. `took`: by handler, how long each call of it took that came to an end or
    was given up; a call with a batch is one.
    """

    consumer: Consumer
    hand_on: Settle
    new_child: Callable[[], Child]
    in_processes: bool
    shutdown: Shutdown
    clock: Clock
    seconds: float = 1.0  # moving average of one mail's time in a thread; slow until shown fast

    def __post_init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Started]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._turns: dict[int, Turn] = {}
        self._children: set[Child] = set()
        self._ended = False
        self.busy = 0  # mails that take a handler's place: put here and not handed on, but the one that runs alone
        self._numbers = {handler: number for number, handler in reversed([*enumerate(self.consumer.handlers.all)])}
        self.took = {handler.spec: Histogram(WORK) for handler in self.consumer.handlers.all}
        self.batches = any(handler.kind == "batch" for handler in self.consumer.handlers.all)
        self._most_given_up = self.consumer.work.concurrency
        self._given_up = 0
        self.loop = Loop(self)
        self.suspects = Suspects(self)

    def settle(self, outcome: Outcome, *, alone: bool = False) -> None:
        if not self._ended:
            self.hand_on(outcome)
        if alone:
            return
        with self._lock:
            self.busy -= 1
        if not self.fast:  # else the reader goes on when a batch is settled
            self.consumer.has_room()

    @property
    def fast(self) -> bool:
        """Handlers are so fast that it pays to read ahead."""
        return self.seconds < FAST_HANDLER

    def start(self) -> None:
        kinds = {handler.kind for handler in self.consumer.handlers.all}
        if self.in_processes or kinds != {"async"}:
            for number in range(self.consumer.work.concurrency):
                self._start_thread(f"handler-{number}")
        if not self.in_processes and "async" in kinds:
            self.loop.start()
        self.shutdown.guard("suspects", self.suspects.run)

    def put(self, started: Sequence[Started]) -> None:
        """Mails that are begun, to be handled now."""
        with self._lock:
            self.busy += sum(not mail.alone for mail in started)
        batches: dict[Handler, list[Started]] = {}
        for mail in started:
            handler = mail.handler
            if mail.alone:
                self.suspects.put(mail)
            elif handler.kind == "async" and not self.in_processes:
                self.loop.put(mail)
            elif handler.kind == "batch" and mail.attempts == 0:
                batches.setdefault(handler, []).append(mail)
            else:  # also a batch handler's mail that failed before: alone, so that it fails alone
                self._queue.put([mail])
        most = self.consumer.work.batch_size
        for mails in batches.values():
            for first in range(0, len(mails), most):
                self._queue.put(mails[first : first + most])

    # threads, each with a process of its own or without

    def _start_thread(self, name: str) -> None:
        self.shutdown.guard(name, self._work_in_process if self.in_processes else self._work)

    def _work(self) -> None:
        while True:
            turn = self._next()
            outcomes = self._handle_here(turn.mails)
            if not self._over(turn, outcomes):
                return

    def _work_in_process(self) -> None:
        child: Child | None = None
        while True:
            turn = self._next()
            if child is None:
                child = self.ready_child()
            outcomes = self.handle_there(child, turn.mails)
            if isinstance(outcomes, Ended):
                self.forget(child)
                child = None
                outcomes = [self.crashed(mail, outcomes) for mail in turn.mails]
            self._over(turn, outcomes)

    def _next(self) -> Turn:
        mails = self._queue.get()
        turn = Turn(mails, self.clock.monotonic(), threading.get_ident())
        with self._lock:
            self._turns[turn.thread] = turn
        return turn

    def _over(self, turn: Turn, outcomes: Sequence[Outcome]) -> bool:
        """Hand on what came of it; False if nobody waits for that any more."""
        with self._lock:
            if turn.given_up:
                log.info("a handler that was given up has ended after all: what came of it is ignored")
                self._given_up -= 1
                return False
            del self._turns[turn.thread]
        for outcome in outcomes:
            self.settle(outcome)
        took = self.clock.monotonic() - turn.began
        self.took[turn.mails[0].handler.spec].observe(took)
        self.seconds += 0.05 * (took / len(turn.mails) - self.seconds)
        return True

    def time(self, mail: Started, began: float) -> None:
        """A call of this mail's handler, which `began` then, is over."""
        self.took[mail.handler.spec].observe(self.clock.monotonic() - began)

    def _handle_here(self, mails: Sequence[Started]) -> list[Outcome]:
        consumer = self.consumer
        if mails[0].handler.kind != "batch":
            return [consumer.handle(mail) for mail in mails]
        services = [consumer.services(mail) for mail in mails]
        deadline = self.clock.wall() + timedelta(seconds=mails[0].handler.timeout)
        outcomes = handle_batch(mails, services, consumer.terms, deadline)
        return [consumer.finished(*row) for row in zip(mails, services, outcomes, strict=True)]

    # what takes too long

    def look_for_late(self) -> None:
        """Give up what took longer than its time-out in a thread; called once a tick."""
        now = self.clock.monotonic()
        late = []
        with self._lock:
            for turn in self._turns.values():
                if not self.in_processes and now - turn.began > turn.mails[0].handler.timeout:
                    turn.given_up = True
                    late.append(turn)
            for turn in late:
                del self._turns[turn.thread]
                self._given_up += 1
        for turn in late:
            self._give_up(turn)
        if self._given_up > self._most_given_up:
            self.shutdown.request(f"{self._given_up} handlers hang in threads that cannot be stopped", exit_code=1)
        self.loop.look_for_late(now)

    def _give_up(self, turn: Turn) -> None:
        handler = turn.mails[0].handler
        frame = sys._current_frames().get(turn.thread)
        frames = traceback.extract_stack(frame)[-10:] if frame else []
        stack = "".join(traceback.format_list(frames))
        log.error(
            "%s takes longer than HANDLER_TIMEOUT (%g s) with %s: the attempt has failed, its lease is given up. A thread cannot be "
            "stopped: it goes on, what it does may be repeated (WORKER_ISOLATION=process can kill it). It stands in %s",
            handler.spec,
            handler.timeout,
            ", ".join(mail.delivery.email_id for mail in turn.mails[:3]),
            " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-3:]),
        )
        self.time(turn.mails[0], turn.began)
        for mail in turn.mails:
            self.settle(self.timed_out(mail, stack))
        self._start_thread("handler-instead")

    def timed_out(self, mail: Started, stack: str = "") -> Failure:
        return self._failure(mail, HandlerTimeout(f"took longer than {mail.handler.timeout:g} s"), stack)

    def _failure(self, mail: Started, error: IngestionError, stack: str = "") -> Failure:
        """What becomes of a mail whose handler did not come to its end."""
        decision = decide(error, mail.attempts, mail.handler.policy, self.consumer.terms.chance())
        kind = type(error).__name__
        return Failure(mail.delivery, decision.verb, decision.delay, decision.reason, kind, str(error), stack, mail.handler.spec)

    # processes

    def ready_child(self) -> Child:
        """A process whose handlers are loaded. Raises Fatal where they cannot be, though they could in this one."""
        child = self.new_child()
        with self._lock:
            self._children.add(child)
        if self._ended:
            child.kill()  # whoever wanted it gets to see that it is gone
        ended = child.ready()
        if ended and not self._ended:
            self.forget(child)
            raise Fatal(f"a process for handlers cannot start: {ended.why}")
        return child

    def forget(self, child: Child) -> None:
        child.kill()
        with self._lock:
            self._children.discard(child)

    def handle_there(self, child: Child, mails: Sequence[Started]) -> list[Outcome] | Ended:
        """In that process; Ended: it is gone, and so is what the mails' handler did last."""
        consumer, handler = self.consumer, mails[0].handler
        services = [consumer.services(mail) for mail in mails]
        job = Job(
            tuple((mail.delivery, mail.attempts) for mail in mails),
            self._numbers[handler],
            self.clock.wall() + timedelta(seconds=handler.timeout),
        )
        outcomes = child.run(job, services, handler.timeout, self.clock.monotonic)
        if isinstance(outcomes, Ended):
            return outcomes
        return [consumer.finished(*row) for row in zip(mails, services, outcomes, strict=True)]

    def crashed(self, mail: Started, ended: Ended) -> Failure:
        """The process of this mail's handler is gone. It stays a suspect, unless it just took too long in a process that may be killed."""
        failure = self.timed_out(mail) if ended.timed_out else self._failure(mail, ProcessDied(ended.why))
        suspect = mail.alone or not ended.timed_out
        return replace(failure, verb="crash") if suspect and failure.verb == "retry" else failure

    def end(self) -> None:
        """At the end of the worker: nothing is settled any more, so that what still runs can be handed back; processes are killed."""
        with self._lock:
            self._ended = True
            children = list(self._children)
        for child in children:
            child.end()


@dataclass
class Suspects:
    """One thread and one process: a suspect at a time, beside all other work."""

    runners: Runners

    def __post_init__(self) -> None:
        self._queue: queue.SimpleQueue[Started | None] = queue.SimpleQueue()
        self._child: Child | None = None
        self._asked = False

    def ready(self) -> bool:
        """Whether the process stands ready; if not, it will soon: so a start is not counted while the process itself starts."""
        if self._child is None and not self._asked:
            self._asked = True
            self._queue.put(None)
        return self._child is not None

    def put(self, mail: Started) -> None:
        self._queue.put(mail)

    def run(self) -> None:
        while True:
            try:
                mail = self._queue.get(timeout=IDLE_SECONDS if self._child else None)
            except queue.Empty:
                self._close()
                continue
            if self._child is None:
                self._child = self.runners.ready_child()
            self._asked = False
            if mail is not None:
                self._handle(self._child, mail)

    def _handle(self, child: Child, mail: Started) -> None:
        began = self.runners.clock.monotonic()
        outcomes = self.runners.handle_there(child, [mail])
        self.runners.time(mail, began)
        if isinstance(outcomes, Ended):
            self._close()
            outcomes = [self.runners.crashed(mail, outcomes)]
        for outcome in outcomes:
            self.runners.settle(outcome, alone=True)

    def _close(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            self.runners.forget(child)


@dataclass
class Loop:
    """The one event loop on which async handlers run. Each mail is one task, the handler's own, and no task of ours waits for it: a
    handler may cancel all that there are."""

    runners: Runners
    _tasks: dict[asyncio.Task[Outcome], Started] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._turned = 0.0
        timeouts = [handler.timeout for handler in self.runners.consumer.handlers.all if handler.kind == "async"]
        self._longest = max(timeouts, default=math.inf)

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()  # not before: one that is never run complains when a process ends early
        self.runners.shutdown.guard("handler-loop", self._run)

    def put(self, mail: Started) -> None:
        self._loop.call_soon_threadsafe(self._begin, mail)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._turn()
        self._loop.run_forever()
        raise Fatal("an async handler stopped the event loop")

    def _turn(self) -> None:
        self._turned = self.runners.clock.monotonic()
        self._loop.call_later(0.5, self._turn)

    def _begin(self, mail: Started) -> None:
        runners, timeout = self.runners, mail.handler.timeout
        services = runners.consumer.services(mail)
        deadline = runners.clock.wall() + timedelta(seconds=timeout)
        began = runners.clock.monotonic()
        task = self._loop.create_task(handle_async(mail, services, runners.consumer.terms, deadline))
        self._tasks[task] = mail
        timer = self._loop.call_later(timeout, self._give_up, task, began)
        task.add_done_callback(partial(self._over, services, began, timer))

    def _over(self, services: LocalServices, began: float, timer: asyncio.TimerHandle, task: asyncio.Task[Outcome]) -> None:
        mail = self._tasks.pop(task, None)
        if mail is None:
            return  # given up: what comes of it is ignored
        timer.cancel()
        self.runners.time(mail, began)
        try:
            outcome = task.result()
        except BaseException as error:  # noqa: BLE001  # another handler cancelled it before it began: its mail's fate too
            outcome = settled(mail, error, self.runners.consumer.terms)
        self.runners.settle(self.runners.consumer.finished(mail, services, outcome))

    def _give_up(self, task: asyncio.Task[Outcome], began: float) -> None:
        if task.done():
            return  # a moment ago
        mail = self._tasks.pop(task)
        self.runners.time(mail, began)
        log.error("%s takes longer than %g s with %s: cancelled", mail.handler.spec, mail.handler.timeout, mail.delivery.email_id)
        stack = "".join("".join(traceback.format_stack(frame)) for frame in task.get_stack(limit=10))
        task.cancel()
        self.runners.settle(self.runners.timed_out(mail, stack))

    def look_for_late(self, now: float) -> None:
        """A handler that blocks the loop holds every mail on it: where it does so for its whole time-out, only a restart helps."""
        longest = max((mail.handler.timeout for mail in [*self._tasks.values()]), default=self._longest)
        if self._turned and now - self._turned > longest:
            self.runners.shutdown.request("an async handler blocks the event loop: use await, or a plain function", exit_code=1)
