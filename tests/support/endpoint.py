"""The HTTP endpoint of a daemon, as a test asks it."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

from tests.support.pipeline import DEADLINE
from tests.support.wait import until


class Asked:
    """The endpoint at a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, page: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{page}", timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def until(self, page: str, code: int, pattern: str = "") -> Any:
        """Wait until the page is answered with `code` and a text that holds `pattern`; its body."""

        def found() -> Any:
            try:
                status, body = self.get(page)
            except urllib.error.URLError:  # not listening yet
                return None
            return (status == code and re.search(pattern, json.dumps(body, ensure_ascii=False)) and body) or None

        return until(found, DEADLINE, f"/{page} says {code} {pattern}")

    def mailbox(self, account: str) -> Any:
        [found] = [box for box in self.get("status")[1]["mailboxes"] if box["account"] == account]
        return found
