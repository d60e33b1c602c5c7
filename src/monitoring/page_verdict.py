"""Is mail flowing, what is stuck and why, what to run. Pure: what was seen and the time are handed in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from src.common.registry import News, Seen
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
# state → what is to be said of the mailbox
SAYS = {
    "PAUSED": "is paused",
    "BACKFILL_PAUSED": "gets its new mail only",
    "REREADING": "is read again from the start",
    "DISCONNECTED": "is not read: no connection",
    "OVERQUOTA": "is not read: its quota is used up",
    "THROTTLED": "is not read: the server is too busy",
    "CONNECTIONS": "is not read: too many sessions",
    "REAUTH_REQUIRED": "is not read: it needs a new consent",
    "MISCONFIGURED": "is not read: a setting or a file is wrong",
}
QUIET = ("STARTING", "CONNECTED", "STANDBY", "STOPPED")
SELDOM_READ = ("REREADING", "BACKFILL_PAUSED")  # not as usual, and mail flows

# Only lines that are ours, whole: a sentence may quote what a mail server said.
_WORD = r"(?:[\w@%+=:,./-]+|'[^'\n]+')"
_COMMAND = re.compile(
    rf"python producer\.py --auth-setup(?: --username {_WORD})?|python producer\.py --list-mailboxes|chmod 600 {_WORD}"
    r"|redis-cli CONFIG SET maxmemory-policy noeviction"
)
_OF_MAILBOX = re.compile(rf"(?P<title>.+?): (?P<state>{'|'.join(ADVICE)})(?:: (?P<why>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Trouble:
    """`what` is wrong, `why`, what `todo` in words, and the `command` to run; "" for none. `stops`: what stands still of it, "" where
    mail flows."""

    level: Level
    what: str
    why: str = ""
    todo: str = ""
    command: str = ""
    stops: str = ""


@dataclass(frozen=True)
class View:
    """What a page shows. `status`: what /status of this daemon says; `news`: what its heartbeat would say. `now`: in UTC."""

    snapshot: Snapshot
    status: Mapping[str, Any]
    news: News
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

    @property
    def daemons(self) -> list[Seen]:
        """As they are registered; of this one what is so now."""
        return [Seen(seen.daemon, 0.0, self.news) if seen.daemon.name == self.name else seen for seen in self.snapshot.daemons]

    def alive(self, role: str) -> list[Seen]:
        return [seen for seen in self.daemons if seen.daemon.role == role and seen.alive]


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


def parted(why: str) -> tuple[str, str]:
    """(sentence, command): what a cause says, and the command that it tells to run, "" for none."""
    found = _COMMAND.search(why)
    if not found:
        return why, ""
    before = re.sub(r"[;,.]? *(?:[Rr]un:|Consent again:)? *$", "", why[: found.start()])
    return before + (f". {rest[:1].upper()}{rest[1:]}" if (rest := why[found.end() :].strip(" .()")) else ""), found[0]


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
        todo = "Every daemon waits and goes on by itself when it answers. Is the server up, and is REDIS_URL right?"
        yield Trouble("bad", "Redis does not answer", view.away, todo, stops="Mail stands still: Redis does not answer")
    yield from _of_this_daemon(view)
    yield from _of_the_others(view)
    for what, why in () if view.away else snapshot.faults:
        todo = "If it is for want of rights: docs/security.md has the ACL lines."
        yield Trouble("warn", f"This page cannot look at {what}", why, todo)
    overview = snapshot.overview
    if overview and overview.oldest > OLD_SECONDS and overview.unread and view.alive("worker"):
        what = f"The oldest unfinished mail is {ago(overview.oldest)} old, and {overview.unread:,} are not begun"
        yield Trouble("warn", what, todo="The workers do not keep up. Start another:", command=RESTART["worker"])
    yield from _dead_lately(view)


def _dead_lately(view: View) -> Iterator[Trouble]:
    ages = [(age_of(group.last, view.now), group) for group in view.snapshot.letters.groups]
    fresh = [(age, group) for age, group in ages if age is not None and age < NEWS_SECONDS]
    if not fresh:
        return
    last, most = min(age for age, _ in fresh), fresh[0][1]
    count = sum(group.count for _, group in fresh)
    what = f"{count:,} dead letter{'s' * (count != 1)}"
    if len(fresh) == 1:
        todo, command = "Look at one under Dead letters and mend the cause. Then send them back:", replay_group(most.group)
        yield Trouble("warn", f"{what}: {most.group}", f"The last mail died {ago(last)} ago.", todo, command)
    else:
        todo, command = (
            "Look at one of each under Dead letters, and mend the causes. All of them:",
            "python scripts/dlq.py groups",
        )
        why = f"The last mail died {ago(last)} ago. Most of them: {most.group}."
        yield Trouble("warn", f"{what} of {len(fresh)} errors", why, todo, command)


def _of_this_daemon(view: View) -> Iterator[Trouble]:
    boxes = view.status.get("mailboxes", [])
    at_work = [box for box in boxes if box["state"] in (*QUIET, *SELDOM_READ)]
    for box in boxes:
        if box["state"] not in QUIET:
            stops = "" if at_work else "No new mail comes in"
            yield _of_mailbox(f"{box['account']}/{box['mailbox']}", box["state"], box["why"], stops)
    titles = tuple(f"{box['account']}/{box['mailbox']}: " for box in boxes)
    for sentence in view.news.why:
        if not sentence.startswith(("Redis: ", *titles)):
            yield _said(f"this {view.role}", sentence, _stops(view))


def _of_the_others(view: View) -> Iterator[Trouble]:
    for seen in view.daemons:
        daemon = seen.daemon
        if daemon.name == view.name:
            continue
        for sentence in seen.news.why if seen.alive else ():
            if not sentence.startswith("Redis: "):  # that was then: its heartbeat has reached Redis since
                yield _said(f"{daemon.role} {daemon.name}", sentence, _stops(view))
        if not seen.alive and seen.silent < NEWS_SECONDS:
            yield Trouble(
                "warn",
                f"{daemon.role} {daemon.name} is gone",
                f"No heartbeat for {ago(seen.silent)}: killed, or cut off from Redis.",
                "What it had in hand goes to the others. See its log, and start another:",
                RESTART.get(daemon.role, ""),
            )
    if view.snapshot.at is None:
        return
    overview = view.snapshot.overview
    waiting = overview.live if overview else 0
    if view.role != "producer" and not view.alive("producer"):
        stops = "No new mail comes in"
        yield Trouble("bad", "No producer is alive", todo="Start one:", command=RESTART["producer"], stops=stops)
    if view.role != "worker" and not view.alive("worker"):
        why = f"{waiting:,} unfinished mails wait for one." if waiting else "No mail waits for one yet."
        stops = "Mail is not handled" if waiting else ""
        yield Trouble("bad" if waiting else "warn", "No worker is alive", why, "Start one:", RESTART["worker"], stops)


def _of_mailbox(title: str, state: str, why: str, stops: str = "") -> Trouble:
    sentence, command = parted(why)
    level: Level = "warn" if state in SELDOM_READ else "bad"
    return Trouble(level, f"{title} {SAYS.get(state, f'is {state}')}", sentence, ADVICE.get(state, ""), command, stops)


def _said(who: str, sentence: str, stops: str) -> Trouble:
    """A daemon's own sentence. `stops`: what stands still if it is a worker that does not read."""
    mailbox = _OF_MAILBOX.fullmatch(sentence)
    if mailbox:
        return _of_mailbox(mailbox["title"], mailbox["state"], mailbox["why"] or "")
    why, command = parted(sentence)
    if not sentence.startswith("not reading: "):
        return Trouble("warn", f"{who} reports trouble", why, command=command)
    what, why = f"{who} takes no mail", sentence.removeprefix("not reading: ")
    if why.startswith("every breaker"):
        return Trouble("bad", what, why, "It goes on by itself when what the handler calls answers again.", stops=stops)
    if why.startswith("schema"):
        return Trouble("bad", what, why, "A newer producer wrote that mail: update this worker.", stops=stops)
    todo = "Mend the handler and restart the workers. Then replay or discard what died:"
    return Trouble("bad", what, why, todo, "python scripts/dlq.py groups", stops)


def _stops(view: View) -> str:
    """What a worker's not reading stops: everything, if no other reads."""
    reading = [not any(why.startswith("not reading: ") for why in seen.news.why) for seen in view.alive("worker")]
    return "" if any(reading) else "Mail is not handled"


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
