"""The status page as HTML. Pure. Nothing from outside becomes markup: every value that is put into a template is escaped there."""

from __future__ import annotations

import base64
import hashlib
import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from src.common.redis_client import Fields
from src.common.registry import Registration, Seen
from src.monitoring.page_flow import MINUTES
from src.monitoring.page_look import Snapshot, record_of
from src.monitoring.page_verdict import (
    ADVICE,
    NEWS_SECONDS,
    QUIET,
    SELDOM_READ,
    View,
    age_of,
    ago,
    judge,
    parted,
    replay_group,
    replay_one,
)

STYLE = Path(__file__).with_name("page.css").read_text()
SCRIPT = Path(__file__).with_name("page.js").read_text()
BODY_CHARS = 65_536
MOST_DAEMONS = 100


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Html(str):
    """Text that is markup already."""


def h(template: str, *values: object) -> Html:
    """`template` with each {} replaced by a value: escaped, unless it is Html. Templates are literals of this file."""
    return Html(template.format(*(value if isinstance(value, Html) else html.escape(str(value)) for value in values)))


def joined(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


# the page


def page(view: View, host: str) -> str:
    """`host`: the name under which it was asked for."""
    title, icon = _title(view)
    return _document(
        title, icon, h('{}<main id="main" class="wrap">{}</main>{}', _top(view), fragment(view, host), _foot()), live=True
    )


def fragment(view: View, host: str) -> Html:
    """The parts of the page, each in an element of its own with an id: what the script replaces."""
    return joined(
        (_verdict(view), _cards(view), _mailboxes(view, host), _daemons(view, host), _retries(view.snapshot), _letters(view))
    )


def _document(title: str, icon: str, body: Html, *, live: bool) -> str:
    again = '<noscript><meta http-equiv="refresh" content="10"></noscript>' if live else ""
    return h(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '{}<title>{}</title><link rel="icon" id="icon" href="{}"><style>{}</style></head><body>'
        '<a class="skip" href="#main">To the content</a><p class="unseen" id="said" role="status"></p>{}<script>{}</script></body></html>',
        Html(again),
        title,
        icon,
        Html(STYLE),
        body,
        Html(SCRIPT),
    )


def _title(view: View) -> tuple[str, str]:
    verdict = judge(view)
    color = {"good": "2f9461", "warn": "e0a030", "bad": "d0342c"}[verdict.level]
    dot = f"<circle cx='8' cy='8' r='7' fill='%23{color}'/>"
    icon = f"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>{dot}</svg>"
    return f"{verdict.headline} · {view.role} {view.name}", icon


def _top(view: View) -> Html:
    return h(
        '<header class="top"><div class="wrap"><p><strong>Email ingestion twins</strong> <span class="soft">{} {}</span></p></div>'
        '</header><div class="lost" id="lost" role="alert" hidden><div class="wrap">This daemon has not answered since '
        '<span id="since"></span> UTC. Below is what it said last. Does it still run?</div></div>',
        view.role,
        view.name,
    )


def _foot() -> Html:
    return h(
        '<footer class="wrap"><p class="foot soft"><span>Read-only: what changes something is a command to run yourself.</span>'
        '<a href="/health">health</a><a href="/ready">ready</a><a href="/status">status as JSON</a></p></footer>'
    )


def _part(name: str, heading: str, note: object, body: Html) -> Html:
    return h(
        '<section class="part" id="{}" data-part aria-labelledby="{}-h"><div class="head"><h2 id="{}-h">{}</h2>'
        '<span class="soft">{}</span></div>{}</section>',
        name,
        name,
        name,
        heading,
        note,
        body,
    )


def _command(text: str, where: str) -> Html:
    """A command, to select or to copy. `where`: which part of the page it stands in, for an id that stays the same."""
    if not text:
        return Html("")
    key = hashlib.sha256(f"{where} {text}".encode(errors="replace")).hexdigest()[:10]
    return h(
        '<div class="cmd"><code id="c{}">{}</code><button type="button" id="b{}" data-copy aria-describedby="c{}">Copy</button></div>',
        key,
        text,
        key,
        key,
    )


def _pill(level: str, text: str) -> Html:
    return h('<span class="pill {}">{}</span>', level, text)


def _facts(facts: Iterable[str]) -> Html:
    return h('<p class="facts">{}</p>', joined(h("<span>{}</span>", fact) for fact in facts if fact))


def _rows(rows: Sequence[Html], empty: str) -> Html:
    if not rows:
        return h('<p class="empty">{}</p>', empty)
    return h('<ul class="rows">{}</ul>', joined(h("<li>{}</li>", row) for row in rows))


MARKS = {
    "good": Html('<path d="M4 10.5l4 4 8-9"/>'),
    "warn": Html('<path d="M10 4v7.5M10 15.5v.01"/>'),
    "bad": Html('<path d="M5 5l10 10M15 5L5 15"/>'),
}


def _verdict(view: View) -> Html:
    verdict = judge(view)
    title, icon = _title(view)
    at = view.snapshot.at
    seen = h("Seen {:}", f"{at:%H:%M:%S} UTC") if at else Html("Nothing was seen yet")
    if view.away and at:
        seen = h("Last seen {} UTC, {} ago", f"{at:%H:%M:%S}", ago((view.now - at).total_seconds()))
    troubles = [
        h(
            '<li class="{}"><div><p class="what">{}</p>{}</div><div>{}{}</div></li>',
            trouble.level,
            _sentence(trouble.what) if trouble.what.startswith(("this ", "worker ", "producer ")) else trouble.what,
            h("<p>{}</p>", _sentence(trouble.why)) if trouble.why else Html(""),
            h("<p>{}</p>", trouble.todo) if trouble.todo else Html(""),
            _command(trouble.command, f"verdict {number}"),
        )
        for number, trouble in enumerate(verdict.troubles)
    ]
    return h(
        '<section id="verdict" data-part class="verdict {}" aria-labelledby="says"><div class="says"><div class="mark" aria-hidden="true">'
        '<svg viewBox="0 0 20 20">{}</svg></div><h1 id="says" data-title="{}" data-icon="{}">{}</h1>'
        '<p>{} <span class="soft"><span class="live" aria-hidden="true"></span>{}</span></p></div>{}</section>',
        verdict.level,
        MARKS[verdict.level],
        title,
        icon,
        verdict.headline,
        verdict.line,
        seen,
        h('<ul class="troubles" aria-label="What is wrong and what to do">{}</ul>', joined(troubles)) if troubles else Html(""),
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


# the last hour


def _cards(view: View) -> Html:
    snapshot, overview = view.snapshot, view.snapshot.overview
    minutes = snapshot.flow or (None,) * MINUTES
    counts = {
        kind: [None if m is None else float(m.counts.get(kind, 0)) for m in minutes]
        for kind in ("entered", "done", "retried", "dead")
    }
    live = [None if minute is None else float(minute.live) for minute in minutes]
    oldest = [None if minute is None else minute.oldest for minute in minutes]
    common = max([1.0, *(value for kind in ("entered", "done") for value in counts[kind] if value)])
    start = view.now.timestamp() // 60 - MINUTES + 1
    unread = f"{overview.unread:,} new · {overview.in_flight:,} in work · {overview.waiting:,} waiting" if overview else ""
    waits = f"{overview.waiting:,} waiting now" if overview else ""
    stands = f"{overview.dead:,} dead letter{'s' * (overview.dead != 1)} now" if overview else ""

    def rate(kind: str, name: str, note: str, top: float | None = None) -> Html:
        values = counts[kind]
        total = sum(value for value in values if value)
        return _card(kind, name, f"{total:,.0f}", note, values, top, f"{max([0.0, *(v for v in values if v)]):,.0f}", start)

    def gauge(name: str, now: str, note: str, values: Sequence[float | None], peak: str) -> Html:
        return _card("gauge", name, now, note, values, None, peak, start)

    cards = (
        rate("entered", "Came in", "into the stream", common),
        rate("done", "Done", "by the handlers", common),
        gauge(
            "Unfinished", f"{overview.live:,}" if overview else "?", unread, live, f"{max([0.0, *(v for v in live if v)]):,.0f}"
        ),
        rate("retried", "Retried", waits),
        rate("dead", "Died", stands),
        gauge(
            "Oldest unfinished",
            (ago(overview.oldest) if overview.live else "none") if overview else "?",
            "since it came in" if overview and overview.live else "no mail is unfinished" if overview else "",
            oldest,
            ago(max([0.0, *(v for v in oldest if v)])),
        ),
    )
    watched = (view.now - snapshot.since).total_seconds()
    since = f", watched since {snapshot.since:%H:%M} UTC, when this daemon began" if watched < 60 * MINUTES else ""
    return h(
        '<section id="flow" data-part aria-labelledby="flow-h"><h2 id="flow-h" class="unseen">The last hour</h2><div class="cards">{}</div>'
        '<p class="soft under">The last hour, minute by minute{}.</p></section>',
        joined(cards),
        since,
    )


def _card(
    kind: str, name: str, big: str, note: str, values: Sequence[float | None], top: float | None, peak: str, start: float
) -> Html:
    most = top or max([1.0, *(value for value in values if value)])
    bars = joined(
        h(
            '<rect class="{}" x="{}" y="{:}" width="3" height="{:}"><title>{} UTC: {}</title></rect>',
            kind,
            4 * number,
            f"{54 - bar:.1f}",
            f"{bar:.1f}",
            f"{int(start + number) // 60 % 24:02}:{int(start + number) % 60:02}",
            ago(value) if name.startswith("Oldest") else f"{value:,.0f}",
        )
        for number, value in enumerate(values)
        if value and (bar := max(1.5, 52 * min(1.0, value / most)))
    )
    ground = joined(
        h('<line class="{}" x1="{}" y1="55" x2="{}" y2="55"/>', "base" if watched else "unknown", 4 * run[0], 4 * run[-1] + 4)
        for watched, numbers in groupby(range(len(values)), lambda number: values[number] is not None)
        if (run := list(numbers))
    )
    label = f"{name}, the last hour by the minute: {big}, at most {peak}"
    return h(
        '<figure class="card"><figcaption><h3>{}</h3><span class="big">{}</span>'
        '<span class="note">{}</span></figcaption><svg viewBox="0 0 240 56" preserveAspectRatio="none" role="img" aria-label="{}">{}'
        "{}</svg>"
        '<div class="scale" aria-hidden="true"><span>1 h ago</span><span>most {}</span><span>now</span></div></figure>',
        name,
        big,
        note,
        label,
        bars,
        ground,
        peak,
    )


# what stands where


def _mailboxes(view: View, host: str) -> Html:
    if view.role != "producer":
        rows = [
            h(
                '<div class="row">{}<h3>{}</h3></div>{}<p class="why">{}</p>',
                _pill("bad" if seen.news.why else "good", "trouble" if seen.news.why else "reads"),
                f"producer {seen.daemon.name}",
                joined(h('<p class="why">{}</p>', why) for why in seen.news.why),
                _link(seen.daemon, view, host, "Its mailboxes, one by one"),
            )
            for seen in view.alive("producer")
        ]
        return _part(
            "mailboxes", "Mailboxes", "as their producer tells", _rows(rows, "No producer is alive, so no mailbox is read.")
        )
    boxes = view.status.get("mailboxes", [])
    bad = [box for box in boxes if box["state"] not in QUIET]
    note = f"{len(boxes)}, {'all well' if not bad else f'{len(bad)} not as usual'}"
    ordered = [*bad, *(box for box in boxes if box["state"] in QUIET)]
    return _part("mailboxes", "Mailboxes", note, _rows([_mailbox(box) for box in ordered], "This producer has no mailbox."))


def _mailbox(box: Mapping[str, Any]) -> Html:
    state, why = box["state"], box["why"]
    level = "good" if state in QUIET else "warn" if state in SELDOM_READ else "bad"
    contact, ends = box["seconds_since_contact"], box["token"].get("expires_in_seconds")
    facts = (
        f"last contact {ago(contact)} ago" if contact is not None else "no contact yet",
        f"{box['published']:,} published",
        "" if contact is None else f"{box['lag']:,} to read" if box["lag"] else "nothing left to read",
        f"up to UID {box['last_uid']}" if box["last_uid"] else "",
        f"{box['unaccounted']:,} unaccounted" if box["unaccounted"] else "",
        f"{box['account_bytes_today'] / 1e6:,.1f} MB today" if box["account_bytes_today"] > 50_000 else "",
        f"token {'ends in ' + ago(ends) if ends > 0 else 'has ended'}" if isinstance(ends, (int, float)) else "",
    )
    why, command = parted(why)
    todo = ADVICE.get(state, "") if state not in ("CONNECTED", "STOPPED") else ""
    return h(
        '<div class="row">{}<h3>{}</h3></div>{}{}{}{}',
        _pill(level, state.replace("_", " ").lower()),
        f"{box['account']} / {box['mailbox']}",
        h('<p class="why">{}</p>', _sentence(why)) if why else Html(""),
        h('<p class="why">{}</p>', todo) if todo else Html(""),
        _command(command, f"mailbox {box['account']} {box['mailbox']}"),
        _facts(facts),
    )


def _daemons(view: View, host: str) -> Html:
    seen = sorted(view.daemons, key=lambda one: (_turn(one), one.daemon.role, one.daemon.name))
    alive = {role: len(view.alive(role)) for role in ("producer", "worker")}
    note = f"{alive['producer']} producer{'s' * (alive['producer'] != 1)} and {alive['worker']} worker{'s' * (alive['worker'] != 1)} alive"
    rows = [_daemon(one, view, host) for one in seen[:MOST_DAEMONS]]
    note += f"; {len(seen) - MOST_DAEMONS} more are not shown" if len(seen) > MOST_DAEMONS else ""
    return _part("daemons", "Producers and workers", note, _rows(rows, "None is registered in Redis yet."))


def _turn(seen: Seen) -> int:
    """What has just gone comes first, what was gone long ago last."""
    return 1 if seen.alive else 0 if seen.silent < NEWS_SECONDS else 2


def _daemon(seen: Seen, view: View, host: str) -> Html:
    daemon, counts = seen.daemon, seen.news.counts
    names = ("published", "done", "retried", "dead", "duplicates", "recovered", "lost")
    up = age_of(daemon.started, view.now)
    always = ("published",) if daemon.role == "producer" else ("done",)
    why = seen.news.why if seen.alive else ()
    facts = [
        f"{len(why)} trouble{'s' * (len(why) != 1)}, said above" if why else "",
        f"in work {counts['in_flight']:,}" if counts.get("in_flight") else "",
        *(f"{counts.get(name, 0):,} {name}" for name in names if counts.get(name) or name in always),
        f"up {ago(up)}" if up is not None and seen.alive else "",
        f"heartbeat {ago(seen.silent)} ago" if daemon.name != view.name else "",
        f"pid {daemon.pid} on {daemon.host}",
        f"version {daemon.version}",
    ]
    level, state = ("bad", "gone") if not seen.alive else ("warn", "trouble") if why else ("good", "alive")
    link = _link(daemon, view, host, "status page") if seen.alive and daemon.name != view.name else Html("")
    return h(
        '<div class="row">{}<h3>{} {}{}</h3>{}</div>{}',
        _pill(level, state),
        daemon.role,
        daemon.name,
        Html(' <span class="soft">this one</span>') if daemon.name == view.name else Html(""),
        link,
        _facts(facts),
    )


def _link(daemon: Registration, view: View, host: str, text: str) -> Html:
    """To another daemon's page, under a name by which who reads this one can reach it."""
    try:
        address = urlsplit(daemon.address)
        port, name = address.port, address.hostname or ""
    except ValueError:
        return Html("")
    if address.scheme != "http" or not port:
        return Html("")
    same = daemon.host == view.status["host"]
    if name in ("0.0.0.0", "::", "127.0.0.1", "localhost", "::1"):  # noqa: S104  # compared, not listened on
        name = host if same else daemon.host
    return h('<a href="http://{}:{}/">{}</a>', f"[{name}]" if ":" in name else quote(name, errors="replace"), port, text)


def _retries(snapshot: Snapshot) -> Html:
    waiting = snapshot.overview.waiting if snapshot.overview else 0
    rows = [
        h(
            '<div class="row"><span class="count">{}</span><h3>{}</h3></div>{}',
            "due now" if retry.due <= 0 else f"in {ago(retry.due)}",
            retry.subject or "(no subject)",
            _facts((f"{retry.failed} failed attempt{'s' * (retry.failed != 1)}", retry.email_id)),
        )
        for retry in snapshot.retries
    ]
    shown = f", the next {len(rows)} of them" if waiting > len(rows) else ""
    note = f"{waiting:,} wait{'s' * (waiting == 1)}{shown}" if waiting else ""
    return _part("retries", "Waiting for their next attempt", note, _rows(rows if waiting else [], "No mail waits for a retry."))


def _letters(view: View) -> Html:
    letters = view.snapshot.letters
    rows = []
    for group in letters.groups:
        newest = letters.newest[group.example]
        age = age_of(group.last, view.now)
        rows.append(
            h(
                '<div class="row"><span class="count">{}</span><h3>{}</h3></div>{}'
                '<p class="why"><a id="{}" href="/dead/{}">Look at the newest: {}</a></p>'
                '<p class="why soft">Once the cause is mended, send them back:</p>{}',
                f"{group.count:,} ×",
                group.group,
                _facts((f"last {ago(age)} ago" if age is not None else "", f"first {group.first}" if group.count > 1 else "")),
                f"l{hashlib.sha256(group.group.encode(errors='replace')).hexdigest()[:10]}",
                quote(newest.id),
                newest.subject or "(no subject)",
                _command(replay_group(group.group), "letters"),
            )
        )
    notes = [f"{letters.total:,} by error" if letters.total else ""]
    if letters.looked_at < letters.total:
        notes.append(f"the newest {letters.looked_at:,} were looked at; all: python scripts/dlq.py groups")
    if letters.more_groups:
        notes.append(f"{letters.more_groups:,} more groups: python scripts/dlq.py groups")
    return _part("letters", "Dead letters", "; ".join(filter(None, notes)), _rows(rows, "There is no dead letter."))


# one dead letter


def letter_page(view: View, letter_id: str, fields: Fields, group: str, *, bodies: bool) -> str:
    """`bodies`: the mail's text is shown too."""
    record, note = record_of(fields), fields.get
    files = [file for file in record.get("attachments") or () if isinstance(file, dict)]
    facts = {
        "Subject": note("subject", ""),
        "From": note("from", ""),
        "To": _people(record.get("to")),
        "Cc": _people(record.get("cc")),
        "Date": record.get("date", ""),
        "Received": note("internal_date", ""),
        "Mailbox": f"{note('account', '')} / {note('mailbox', '')}, UID {note('uid', '')}",
        "Message-ID": record.get("message_id", ""),
        "Size": f"{record['size']:,} bytes" if isinstance(record.get("size"), int) else "",
        "Attachments": ", ".join(
            f"{file.get('name') or 'without a name'} ({file.get('content_type', '')})" for file in files[:20]
        ),
        "Id": note("email_id", ""),
        "Correlation id": note("correlation_id", ""),
    }
    death = {
        "Died": note("dead_at", ""),
        "Reason": note("dead_reason", ""),
        "Attempts": note("dead_attempts", ""),
        "First failure": note("dead_first_at", ""),
        "Handler": note("dead_handler", ""),
        "Worker": note("dead_worker", ""),
        "Replays before": note("replays", ""),
    }
    error = f"{note('dead_error_type', '')}: {note('dead_error', '')}"
    foreign = note("dead_reason") == "foreign" or "dead_id" in fields
    again = (
        h(
            "<p>It is no mail of ours and cannot be replayed. To give it up:</p>{}",
            _command(f"python scripts/dlq.py discard {letter_id}", "one"),
        )
        if foreign
        else h(
            '<p>Once the cause is mended, send it back, or all of its group:</p>{}{}<p class="why">Its whole story:</p>{}',
            _command(replay_one(letter_id), "one"),
            _command(replay_group(group), "group"),
            _command(f"python scripts/trace.py {shlex.quote(note('email_id', ''))}", "trace"),
        )
    )
    if not bodies:
        body = h(
            '<p class="empty">Not shown. STATUS_PAGE_BODIES=true shows it; so does python scripts/dlq.py show {}</p>', letter_id
        )
    else:
        body = h('<p class="text">{}</p>', str(record.get("body_text") or "(no text)")[:BODY_CHARS])
    content = h(
        '<p class="soft"><a href="/">Back to the status page</a></p>'
        '<section class="part" aria-labelledby="says"><div class="head"><h1 id="says">{}</h1></div>{}</section>{}{}{}{}{}',
        group,
        h('<p class="text">{}</p>', error),
        _section("What to do", again),
        _section("Traceback", h('<pre class="text">{}</pre>', note("dead_traceback") or "(none)")),
        _section("How it died", _pairs(death)),
        _section("The mail", _pairs(facts)),
        _section("Text of the mail", body),
    )
    title, icon = f"Dead letter: {group}", _title(view)[1]
    return _document(title, icon, h('{}<main id="main" class="wrap">{}</main>{}', _top(view), content, _foot()), live=False)


def _section(heading: str, body: Html) -> Html:
    key = heading.split()[-1].lower()
    return h(
        '<section class="part" aria-labelledby="{}-h"><div class="head"><h2 id="{}-h">{}</h2></div>{}</section>',
        key,
        key,
        heading,
        body,
    )


def _pairs(pairs: Mapping[str, object]) -> Html:
    return h(
        '<dl class="pairs">{}</dl>', joined(h("<dt>{}</dt><dd>{}</dd>", name, value) for name, value in pairs.items() if value)
    )


def _people(people: object) -> str:
    found = [person for person in people if isinstance(person, dict)] if isinstance(people, list) else []
    shown = ", ".join(
        " ".join(filter(None, (str(person.get("name", "")), f"<{person.get('address', '')}>"))) for person in found[:10]
    )
    return shown + (f" and {len(found) - 10} more" if len(found) > 10 else "")


def note_page(view: View, heading: str, text: str) -> str:
    """One sentence: there is no such letter, Redis takes too long."""
    content = h(
        '<p class="soft"><a href="/">Back to the status page</a></p><section class="part"><h1>{}</h1><p>{}</p></section>',
        heading,
        text,
    )
    return _document(
        heading, _title(view)[1], h('{}<main id="main" class="wrap">{}</main>{}', _top(view), content, _foot()), live=False
    )
