"""Is mail flowing, what is stuck and why, what to run. Pure: what was seen and the time are handed in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from src.common.registry import Seen
from src.monitoring.page_look import Snapshot

Level = Literal["good", "warn", "bad"]

NEWS_SECONDS = 900.0  # a daemon that fell silent, a mail that died: so long it is news
OLD_SECONDS = 900.0  # a mail that was not yet finished after so long, and does not wait for a retry
RESTART = {"producer": "python producer.py", "worker": "python worker.py"}

# state of a mailbox → what to do about it
ADVICE = {
    "STARTING": "It is being connected to. Nothing to do.",
    "CONNECTED": "Nothing to do.",
    "STANDBY": "Nothing to do: it takes over when that one ends.",
    "PAUSED": "It goes on by itself once workers have caught up or Redis has room. Start more workers, or raise maxmemory.",
    "BACKFILL_PAUSED": "New mail goes on. Old mail follows by itself.",
    "REREADING": "What is missing is read again, what is known is passed over. Nothing to do.",
    "DISCONNECTED": "It is tried again by itself. If it lasts: is the mail server up, and does this machine reach it?",
    "OVERQUOTA": "The server asks for a rest; it goes on by itself. Does another client read the same account?",
    "THROTTLED": "The server asks for a rest; it goes on by itself.",
    "CONNECTIONS": "Too many sessions on this account; it goes on by itself. Close other clients of it.",
    "REAUTH_REQUIRED": "A person must consent again. Nothing is lost meanwhile: the mail waits in the mailbox.",
    "MISCONFIGURED": "Correct what it says; it is tried again each minute.",
    "STOPPED": "This producer is ending.",
}
QUIET = ("STARTING", "CONNECTED", "STANDBY", "STOPPED")
SELDOM_READ = ("REREADING", "BACKFILL_PAUSED")  # not as usual, and mail flows

_COMMAND = re.compile(r"\b(?:python (?:producer\.py|worker\.py|scripts/\w+\.py|-m [\w.]+)|redis-cli|chmod) [^;()…]+")
_STATE = re.compile(rf": ({'|'.join(ADVICE)})\b")


@dataclass(frozen=True)
class Trouble:
    """`stops`: what stands still of it, "" where mail flows. `todo`: in words; `command`: to run, "" for none."""

    level: Level
    what: str
    todo: str
    command: str = ""
    stops: str = ""


@dataclass(frozen=True)
class View:
    """What a page shows. `status`: what /status of this daemon says. `now`: in UTC."""

    snapshot: Snapshot
    status: Mapping[str, Any]
    now: datetime

    @property
    def name(self) -> str:
        return str(self.status["name"])

    @property
    def role(self) -> str:
        return str(self.status["role"])

    @property
    def away(self) -> str:
        """Why Redis cannot be had; "" if it can."""
        redis = self.status["redis"]
        return "" if redis.get("reachable") else str(redis.get("why") or "not asked yet")

    def alive(self, role: str) -> list[Seen]:
        return [seen for seen in self.snapshot.daemons if seen.daemon.role == role and seen.alive]


@dataclass(frozen=True)
class Verdict:
    level: Level
    headline: str
    line: str
    troubles: tuple[Trouble, ...]


def judge(view: View) -> Verdict:
    """The worst first."""
    troubles = sorted(_troubles(view), key=lambda trouble: (not trouble.stops, trouble.level != "bad"))
    if troubles and troubles[0].stops:
        return Verdict("bad", troubles[0].stops, _numbers(view), tuple(troubles))
    if any(trouble.level == "bad" for trouble in troubles):
        return Verdict("bad", "Mail is flowing, but not all of it", _numbers(view), tuple(troubles))
    if troubles:
        return Verdict("warn", "Mail is flowing, with something to look at", _numbers(view), tuple(troubles))
    return Verdict("good", "Mail is flowing", _numbers(view), ())


def command_in(sentence: str) -> str:
    """The command that a sentence tells to run; "" for none."""
    found = _COMMAND.search(sentence)
    return found[0].strip().rstrip(".,") if found else ""


def replay_group(group: str) -> str:
    return f"python scripts/dlq.py replay --error {shlex.quote(group)}"


def replay_one(letter_id: str) -> str:
    return f"python scripts/dlq.py replay {shlex.quote(letter_id)}"


def _numbers(view: View) -> str:
    overview = view.snapshot.overview
    if overview is None:
        return "Redis has not been seen yet."
    done = sum(minute.counts.get("done", 0) for minute in view.snapshot.flow[-5:] if minute)
    live = f"{overview.live:,} unfinished mail{'s' * (overview.live != 1)}" if overview.live else "No mail waits"
    return f"{live}{f', the oldest {ago(overview.oldest)} old' if overview.live else ''}. {done:,} done in the last five minutes."


def _troubles(view: View) -> Iterator[Trouble]:
    snapshot = view.snapshot
    if view.away:
        yield Trouble(
            "bad",
            f"Redis: {view.away}",
            "Every daemon waits and goes on by itself when it answers. Is the server up, and is REDIS_URL right?",
            stops="Mail stands still: Redis does not answer",
        )
    yield from _of_this_daemon(view)
    yield from _of_the_others(view)
    for what, why in () if view.away else snapshot.faults:
        yield Trouble(
            "warn", f"{what} cannot be looked at: {why}", "If it is for want of rights: the ACL lines are in docs/security.md."
        )
    overview = snapshot.overview
    if overview and overview.oldest > OLD_SECONDS and overview.unread and view.alive("worker"):
        yield Trouble(
            "warn",
            f"The oldest unfinished mail is {ago(overview.oldest)} old and {overview.unread:,} are not begun",
            "Workers do not keep up: start another.",
            RESTART["worker"],
        )
    fresh = [
        group for group in snapshot.letters.groups if (age := age_of(group.last, view.now)) is not None and age < NEWS_SECONDS
    ]
    for group in fresh[:3]:
        yield Trouble(
            "warn",
            f"Mail died {ago(age_of(group.last, view.now) or 0)} ago: {group.group} ({group.count:,} so far)",
            "Look at one under Dead letters, mend the cause, then send them back:",
            replay_group(group.group),
        )


def _of_this_daemon(view: View) -> Iterator[Trouble]:
    boxes = view.status.get("mailboxes", [])
    at_work = [box for box in boxes if box["state"] in (*QUIET, *SELDOM_READ)]
    for box in boxes:
        state, title = box["state"], f"{box['account']}/{box['mailbox']}"
        if state not in QUIET and not (view.away and not box["why"]):
            why = f": {box['why']}" if box["why"] else ""
            yield Trouble(
                "warn" if state in SELDOM_READ else "bad",
                f"{title} is {state}{why}",
                ADVICE.get(state, ""),
                command_in(box["why"]),
                "" if at_work else "No new mail comes in",
            )
    titles = tuple(f"{box['account']}/{box['mailbox']}:" for box in boxes)
    for sentence in view.status["why"]:
        if not sentence.startswith(("Redis: ", *titles)):
            yield _said(view.name, sentence, stops=_stops(view))


def _of_the_others(view: View) -> Iterator[Trouble]:
    for seen in view.snapshot.daemons:
        daemon = seen.daemon
        if daemon.name == view.name:
            continue
        for sentence in seen.news.why if seen.alive else ():
            if not (sentence.startswith("Redis: ") and not view.away):  # that was then
                yield _said(f"{daemon.role} {daemon.name}", sentence, stops=_stops(view))
        if not seen.alive and seen.silent < NEWS_SECONDS:
            yield Trouble(
                "warn",
                f"{daemon.role} {daemon.name} is silent for {ago(seen.silent)}: killed, or cut off from Redis",
                "Its unfinished mail goes to the others. See its log, and start another:",
                RESTART.get(daemon.role, ""),
            )
    if view.snapshot.at is None:
        return
    overview = view.snapshot.overview
    waiting = overview.live if overview else 0
    if view.role != "producer" and not view.alive("producer"):
        yield Trouble(
            "bad", "No producer is alive: no new mail comes in", "Start one:", RESTART["producer"], "No new mail comes in"
        )
    if view.role != "worker" and not view.alive("worker"):
        wait = f"{waiting:,} mails wait" if waiting else "no mail waits for one yet"
        stops = "Mail is not handled" if waiting else ""
        yield Trouble("bad" if waiting else "warn", f"No worker is alive: {wait}", "Start one:", RESTART["worker"], stops)


def _said(who: str, sentence: str, *, stops: str) -> Trouble:
    """A daemon's own sentence. `stops`: what stands still if it is a worker that does not read."""
    if sentence.startswith("not reading: "):
        by_itself = sentence.startswith("not reading: every breaker")
        schema = sentence.startswith("not reading: schema")
        todo = (
            "It goes on by itself when what the handler calls answers again."
            if by_itself
            else "Update this worker: a newer producer wrote that mail."
            if schema
            else "Mend the handler, restart the workers, then replay or discard what died:"
        )
        return Trouble("bad", f"{who} is {sentence}", todo, "" if by_itself or schema else "python scripts/dlq.py groups", stops)
    state = _STATE.search(sentence)
    known = state[1] if state else ""
    level: Level = "warn" if known in SELDOM_READ or not known else "bad"
    return Trouble(level, f"{who}: {sentence}", ADVICE.get(known, ""), command_in(sentence))


def _stops(view: View) -> str:
    """What a worker's not reading stops: everything, if no other reads."""
    own = ["not reading" in " ".join(view.status["why"])] if view.role == "worker" else []
    others = ["not reading" in " ".join(seen.news.why) for seen in view.alive("worker") if seen.daemon.name != view.name]
    return "Mail is not handled" if all([*own, *others]) else ""


def age_of(moment: str, now: datetime) -> float | None:
    """Seconds since an ISO 8601 moment; None where it is none."""
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return max(0.0, (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds())


def ago(seconds: float) -> str:
    """`3 s`, `4 min`, `2 h 5 min`, `3 d`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7_200:
        return f"{whole // 60} min"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d"
