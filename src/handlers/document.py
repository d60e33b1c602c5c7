"""A mail as one JSON object: what `webhook` sends and `jsonl` writes."""

from __future__ import annotations

import json

from src.mail.record import Email, record_to_json


def document(email: Email) -> str:
    """One line of JSON, the same for every attempt. `record` is the entry's record as docs/formats.md describes it."""
    return json.dumps(
        {
            "email_id": email.email_id,
            "account": email.account,
            "mailbox": email.mailbox,
            "uid": email.uid,
            "internal_date": email.internal_date,
            "subject": email.subject,
            "record": json.loads(record_to_json(email.record)),
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )
