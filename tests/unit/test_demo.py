"""The demo's own check and handler, without any process."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from src.common.exceptions import Permanent
from src.mail.record import Email, Envelope, Record, gmail_email_id, to_fields
from src.sandbox.demo import Fates, _options, environment, fates, judge
from src.sandbox.demo_handler import handle
from src.testing import context

LEDGER = ("gm:a:1", "gm:a:2", "gm:a:3")


def test_every_mail_in_one_place_holds() -> None:
    """Two results and one dead letter account for three mails."""
    result = fates(LEDGER, ["gm:a:1", "gm:a:3"], ["gm:a:2"])
    assert result.hold
    assert str(result) == "3 received = 2 done + 1 dead · 0 lost · 0 twice"


@pytest.mark.parametrize(
    ("results", "letters", "wrong"),
    [
        pytest.param(["gm:a:1"], ["gm:a:2"], {"lost": ("gm:a:3",)}, id="in neither place: lost"),
        pytest.param(["gm:a:1", "gm:a:3", "gm:a:3"], ["gm:a:2"], {"twice": ("gm:a:3",)}, id="two results: twice"),
        pytest.param(["gm:a:1", "gm:a:2", "gm:a:3"], ["gm:a:2"], {"twice": ("gm:a:2",)}, id="done and dead: twice"),
        pytest.param(["gm:a:1", "gm:a:3"], ["gm:a:2", "gm:a:2"], {"twice": ("gm:a:2",)}, id="two dead letters: twice"),
        pytest.param(["gm:a:1", "gm:a:3", "gm:a:9"], ["gm:a:2"], {"strange": ("gm:a:9",)}, id="a result of no mail"),
    ],
)
def test_each_way_to_be_wrong_is_seen(results: list[str], letters: list[str], wrong: dict[str, tuple[str, ...]]) -> None:
    """A lost mail, one that ended twice and one that nobody sent each make the check fail, with exit code 1 and its id."""
    result = fates(LEDGER, results, letters)
    assert {name: getattr(result, name) for name in ("lost", "twice", "strange") if getattr(result, name)} == wrong
    assert not result.hold
    told: list[str] = []
    assert judge(result, {}, told.append) == 1
    for email_ids in wrong.values():
        assert email_ids[0] in told[0]


def test_the_line_says_when_the_sum_is_wrong() -> None:
    """A mail that is missing is not hidden behind an equals sign."""
    lost = Fates(received=3, done=1, dead=1, lost=("gm:a:3",), twice=(), strange=())
    assert str(lost) == "3 received != 1 done + 1 dead · 1 lost · 0 twice"


def test_the_users_settings_do_not_reach_the_demo() -> None:
    """REDIS_URL or a handler of the caller's environment is left out; PATH and the like stay."""
    caller = {"REDIS_URL": "redis://mine", "WORKER_HANDLER": "my.code:run", "IMAP_HOST": "mine", "PATH": "/bin"}
    given = environment(caller, Path("/d"), "unix:///d/s", 500)
    assert given["REDIS_URL"] == "unix:///d/s"
    assert given["PATH"] == "/bin"
    assert "WORKER_HANDLER" not in given
    assert "IMAP_HOST" not in given


def attempt(number: int, attempt: int) -> object:
    email_id = gmail_email_id("a", str(number))
    envelope = Envelope("a", "INBOX", 1, 1, "2026-01-31T00:00:00Z", 10, email_id, "c", "2026-01-31T00:00:00Z")
    mail = Email(to_fields(envelope, Record(body_text="one two")))
    return handle(mail, context(mail, attempt=attempt))


def test_the_handler_fails_as_the_demo_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 mails in a row one is buried at once, one fails always, five fail only at first, 43 are done."""
    hurry = threading.Event()
    hurry.set()
    monkeypatch.setattr("src.sandbox.demo_handler.PACE", hurry)
    outcomes: dict[str, int] = {}
    for number in range(100, 150):
        name = ""
        for turn in (1, 2):
            try:
                result = attempt(number, turn)
                assert result == {"words": 2, "attachments": 0, "attempt": turn}
                name += "done"
                break
            except Permanent:
                name += "permanent"
                break
            except (RuntimeError, TimeoutError) as error:
                name += type(error).__name__ + " "
        outcomes[name] = outcomes.get(name, 0) + 1
    assert outcomes == {"done": 43, "TimeoutError done": 5, "permanent": 1, "RuntimeError RuntimeError ": 1}


@pytest.mark.parametrize("given", ["abc", "0", "-1", "100001", "1.5"])
def test_a_wrong_number_of_mails_says_what_is_allowed(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _options([f"--emails={given}"])
    assert capsys.readouterr().err.endswith(f"argument --emails: {given} is no number from 1 to 100000\n")
