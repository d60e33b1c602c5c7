"""What a producer knows, under the names of its metrics. Asks nobody."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from config.settings import StreamSettings
from src.auth.oauth2_gmail import days_since
from src.common.clock import Clock
from src.common.overview import Overview
from src.common.registry import Seen
from src.monitoring.metrics import Numbers, Rows, daemon_counts
from src.producer.mailbox import REASONS, STATES, Mailbox

_SEEN = {  # metric → field of Overview
    "live_mails": "live",
    "unread_mails": "unread",
    "in_flight_mails": "in_flight",
    "waiting_mails": "waiting",
    "oldest_age_seconds": "oldest",
    "dead_letters": "dead",
    "results": "results",
}


def of_mailboxes(mailboxes: Sequence[Mailbox], clock: Clock, *, full: bool) -> Numbers:
    """`full`: Redis' memory is at its high-water mark."""
    named = {(mailbox.account, mailbox.name): mailbox for mailbox in mailboxes}
    readers = {labels: mailbox.reader for labels, mailbox in named.items()}
    states = {labels: mailbox.state()[0] for labels, mailbox in named.items()}
    now = clock.monotonic()
    return {
        "email_producer_fetched_total": {labels: reader.fetched for labels, reader in readers.items()},
        "email_producer_fetched_bytes_total": {labels: reader.fetched_bytes for labels, reader in readers.items()},
        "email_producer_published_total": {labels: reader.published for labels, reader in readers.items()},
        "email_producer_known_total": {labels: reader.known for labels, reader in readers.items()},
        "email_producer_reconnects_total": {
            (*labels, reason): mailbox.reconnects[reason] for labels, mailbox in named.items() for reason in REASONS
        },
        "email_producer_mailbox_state": {
            (*labels, state): float(state == current) for labels, current in states.items() for state in STATES
        },
        "email_producer_contact_age_seconds": {
            labels: now - reader.contact for labels, reader in readers.items() if reader.contact is not None
        },
        "email_producer_passed_mails": {labels: reader.passed for labels, reader in readers.items() if reader.passed is not None},
        "email_producer_paused": float(full or "PAUSED" in states.values()),
        "email_stream_unaccounted_mails": _unaccounted(mailboxes),
        **_of_accounts(mailboxes, clock.wall()),
    }


def _unaccounted(mailboxes: Sequence[Mailbox]) -> float | None:
    looked = [mailbox.reader.unaccounted for mailbox in mailboxes if mailbox.reader.looks_back]
    return float(sum(looked)) if looked else None


def _of_accounts(mailboxes: Sequence[Mailbox], now: datetime) -> Numbers:
    expiry, age, used, limit = Rows(), Rows(), dict[tuple[str, ...], int](), Rows()
    for mailbox in mailboxes:
        account, token = (mailbox.account,), mailbox.token
        used[account] = max(used.get(account, 0), mailbox.reader.bytes_today)
        limit[account] = mailbox.settings.mail.daily_bytes
        if "expires" in token:
            expiry[account] = (datetime.fromisoformat(str(token["expires"])) - now).total_seconds()
        days = days_since(str(token.get("consented", "")), now)
        if days is not None:
            age[account] = days * 86_400
    return {
        "email_producer_token_expiry_seconds": expiry,
        "email_producer_token_age_seconds": age,
        "email_producer_quota_used_bytes": Rows(used),
        "email_producer_quota_limit_bytes": limit,
    }


def of_stream(seen: Overview | None, daemons: Collection[Seen], stream: StreamSettings) -> Numbers:
    """What was last seen of the stream and of the daemons on it."""
    return {
        **{f"email_stream_{name}": getattr(seen, field) if seen else None for name, field in _SEEN.items()},
        "email_stream_max_mails": stream.maxlen,
        "email_stream_dead_letters_max": stream.dlq_max,
        "email_daemons": daemon_counts(daemons) if seen else None,
    }
