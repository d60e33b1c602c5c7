"""The sandbox's one service account: its key file, and what a JWT that it signed claims (RFC 7523)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

EMAIL = "reader@sandbox.iam.gserviceaccount.example"
CLIENT_ID = "100000000000000000001"


@cache
def _key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import (
        rsa,
    )  # late: the sandbox starts without it, and makes a key only when asked

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def key_file(token_uri: str) -> str:
    """The JSON that Google's console lets one download for a key of a service account."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = _key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    content = {
        "type": "service_account",
        "project_id": "sandbox",
        "private_key_id": "1",
        "private_key": key,
        "client_email": EMAIL,
        "client_id": CLIENT_ID,
        "token_uri": token_uri,
    }
    return json.dumps(content, indent=2)


def claims(assertion: str) -> Mapping[str, Any] | None:
    """What the JWT claims, if the service account signed it and its time is not over."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from google.auth import jwt

    public = _key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        claimed: Mapping[str, Any] = jwt.decode(assertion, certs=public)  # type: ignore[no-untyped-call]  # google-auth has no types there
    except (ValueError, TypeError):
        return None
    return claimed if claimed.get("iss") == EMAIL else None
