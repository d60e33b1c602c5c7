"""What would be published now: the same plan as in earnest, with nothing written anywhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

from config.settings import Settings
from src.common.clock import Clock, iso
from src.imap.imap_client import Meta
from src.mail.parse import parse
from src.mail.record import Envelope
from src.producer import plan
from src.producer.reader import Session, identity_of
from src.producer.state_manager import MarkerFile, StateManager

SHOWN = 20
HEAD_BYTES = 16_384


@dataclass(frozen=True)
class Line:
    uid: int
    internal_date: str
    size: int
    sender: str
    subject: str


@dataclass(frozen=True)
class Preview:
    """`why`: how the read would begin. `mails`: how many would be published, `size` in bytes; the first of them in `lines`."""

    why: str
    mails: int
    size: int
    known: int
    lines: tuple[Line, ...]


def preview(
    settings: Settings,
    account: str,
    name: str,
    states: StateManager | None,
    marker_file: MarkerFile,
    session_manager: AbstractContextManager[Session],
    clock: Clock,
) -> Preview:
    """Look at one mailbox. `states` is None where no Redis answers: then every mail counts as new."""
    state, marker = (states.look(), marker_file.read()) if states else (None, None)
    with session_manager as session:
        listed = session.uids_from(1)
        highest = listed[-1] if listed else 0
        last = session.meta([highest]) if highest else {}
        opened = plan.opening(
            state,
            marker,
            uidvalidity=session.folder.uidvalidity,
            exists=len(listed),
            highest=highest,
            newest=last[highest].internal_date if highest in last else "",
            threshold=plan.first_threshold(settings.mail.initial_sync, clock.wall()),
            traces=states.traces() if states and state is None else None,
        )
        day = plan.search_day(opened.state)
        uids = plan.candidates(opened.state, listed, set(session.uids_since(day)) if day else None)
        forgotten = iso(clock.wall() - timedelta(days=settings.stream.processed_days))
        fresh: list[Meta] = []
        known = 0
        for first in range(0, len(uids), settings.mail.batch_size):
            metas = list(session.meta(uids[first : first + settings.mail.batch_size]).values())
            identities = [identity_of(account, name, session.folder, meta, settings.mail.dedup_scope) for meta in metas]
            unknown = states.missing(identities, account) if states else range(len(metas))
            known += len(metas) - len(unknown)
            fresh += [metas[i] for i in unknown if plan.counts(opened.state, metas[i].uid, metas[i].internal_date, forgotten)]
        lines = tuple(_line(meta, session.head(meta.uid, HEAD_BYTES)) for meta in fresh[:SHOWN])
    why = opened.why or "new mail"
    return Preview(
        why if states else f"no Redis answers, so every mail counts as new; {why}",
        len(fresh),
        sum(meta.size for meta in fresh),
        known,
        lines,
    )


def _line(meta: Meta, head: bytes) -> Line:
    envelope = Envelope("", "", meta.uid, 0, meta.internal_date, meta.size, "", "", "", truncated=True)
    record = parse(head, envelope)
    return Line(meta.uid, meta.internal_date, meta.size, record.from_.address, record.subject)
