"""Account for every mail: what is in the mailboxes, and where each of it stands. `python scripts/audit.py --help`."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import _path  # noqa: F401  # before the project's own modules
from _bulk import Progress, day
from _command import run_command, say
from config.accounts import load_accounts
from config.settings import Settings
from src.common.circuit_breaker import Breakers, rules_of
from src.common.clock import SYSTEM, iso
from src.common.embedded import existing_redis, open_redis
from src.common.exceptions import IngestionError, RedisFull, RedisUnavailable
from src.common.keys import Keys
from src.common.redis_client import RedisClient
from src.common.shutdown import Shutdown
from src.imap.imap_client import ImapMailbox
from src.producer import audit, repair
from src.producer.audit import Auditor, Balance, Judged
from src.producer.daemon import Access, NoUsableToken, Producer, accesses, imap_endpoint
from src.producer.plan import LATE
from src.producer.repair import Findings
from src.producer.state_manager import Held, StateManager

OWNER_SECONDS = 600.0  # how long the producer that reads a mailbox may take to look again


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Account for every mail of the mailboxes that are read: done, in the stream, waiting, dead, passed and why.",
        epilog="Without --repair nothing is changed. As JSON lines when piped. Exit code: 0 every mail is accounted for and Redis agrees "
        "with itself, 1 not so, or a mailbox could not be looked at, 2 a wrong argument or setting, 3 no mailbox has a usable token. "
        "docs/audit.md tells more.",
    )
    parser.add_argument("--username", metavar="U", action="append", help="account to look at; may be repeated (default: all)")
    parser.add_argument(
        "--mailbox", metavar="M", action="append", help="folder to look at; may be repeated (default: all that are read)"
    )
    parser.add_argument("--since", type=day, metavar="DATE", help="only mail since this INTERNALDATE day (2026-01-31)")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="publish what is known nowhere, mend what in Redis points to nothing, say what was done",
    )
    return parser


class Audit:
    """`failed`: something is not accounted for, not mended or could not be looked at."""

    def __init__(self, settings: Settings, redis: RedisClient, shutdown: Shutdown, given: argparse.Namespace) -> None:
        self.settings, self.redis, self.shutdown, self.given = settings, redis, shutdown, given
        self.keys, self.group = Keys(settings.stream.name), settings.stream.group
        self.failed = False

    def run(self, found: Sequence[Access]) -> int:
        findings = self._examine()
        for access in found:
            for mailbox in access.account.mail.mailboxes:
                self._mailbox(access, mailbox, findings)
                if self.shutdown.requested:
                    return self.shutdown.exit_code or 1
        if self.given.repair:
            self._forget(findings, {access.account.username for access in found})
        self._say_findings(findings)
        return int(self.failed)

    # one mailbox

    def _mailbox(self, access: Access, mailbox: str, findings: Findings) -> None:
        title = f"{access.account.username}/{mailbox}"
        try:
            balance = self._look(access, mailbox, findings)
            if self.given.repair and balance.unaccounted and not self.shutdown.requested:
                before = len(balance.unaccounted)
                self._mend(access, mailbox, balance)
                balance = self._look(access, mailbox, self._examine())
                say(f"{title}: {before - len(balance.unaccounted)} of {before} unaccounted mails are accounted for now")
        except (RedisUnavailable, RedisFull):
            raise
        except IngestionError as error:  # one mailbox must not hold the others
            say(f"{title}: {error}")
            self.failed = True
            return
        self.failed |= bool(balance.unaccounted)
        if not sys.stdout.isatty():
            print(json.dumps(balance.facts(), ensure_ascii=False), flush=True)
            return
        print(balance.sentence())
        for line in balance.reasons():
            print(f"  {line}")
        if balance.unaccounted and not self.given.repair:
            print("  --repair mends that")

    def _look(self, access: Access, mailbox: str, findings: Findings) -> Balance:
        account, mail = access.account.username, access.account.mail
        auditor = Auditor(
            self.redis,
            self.keys,
            self.group,
            self._states(account, mailbox),
            account,
            mailbox,
            mail.dedup_scope,
            iso(SYSTEM.wall() - timedelta(days=self.settings.stream.processed_days)),
            findings.strays,
        )
        balance = Balance(account, mailbox, self.given.since.isoformat() if self.given.since else "")
        progress: Progress | None = None
        try:
            with ImapMailbox(imap_endpoint(mail), account, mailbox, access.credentials.access_token()) as session:
                for left, page in auditor.look(session, self.given.since):
                    progress = progress or Progress(left + len(page), SYSTEM)
                    progress.advance(len(page))
                    for judged in page:
                        balance.add(judged)
                    if self.shutdown.requested:
                        break
        finally:
            if progress:
                progress.end()
        return balance

    def _states(self, account: str, mailbox: str) -> StateManager:
        return StateManager(self.redis, self.keys, account, mailbox, "audit")

    # mend

    def _mend(self, access: Access, mailbox: str, balance: Balance) -> None:
        """What the results know to be done is done; the rest is published by whoever reads the mailbox, or by us if nobody does."""
        states = self._states(access.account.username, mailbox)
        finished = [judged.mail.identity for judged in balance.unaccounted if judged.mail and judged.why == audit.FORGOTTEN]
        for first in range(0, len(finished), audit.PAGE):
            states.remember(finished[first : first + audit.PAGE], access.account.username, self.settings.stream.processed_days)
        rest = [judged for judged in balance.unaccounted if judged.why in (audit.NOWHERE, audit.DELETED)]
        if rest:
            self._publish(access, mailbox, states, rest)

    def _publish(self, access: Access, mailbox: str, states: StateManager, mails: Sequence[Judged]) -> None:
        request = f"{LATE}{audit.oldest_day(mails)}"
        states.request_look(request)
        alone = replace(
            access, account=replace(access.account, mail=access.account.mail.model_copy(update={"mailboxes": (mailbox,)}))
        )
        breakers = Breakers(rules_of(self.settings.breakers), SYSTEM.monotonic, random.random)
        producer = Producer(self.settings, [alone], self.redis, self.shutdown, SYSTEM, breakers)
        [reader] = producer.mailboxes
        if not isinstance(reader.states.acquire(alone.account.mail.lease), Held):
            producer.run_once()
        elif not self._wait(lambda: request not in states.requested().split(",")):
            say(f"{reader.title}: the producer that reads it has not looked again yet; it will: try again later")

    def _wait(self, condition: Callable[[], bool]) -> bool:
        deadline = SYSTEM.monotonic() + OWNER_SECONDS
        while not condition():
            if SYSTEM.monotonic() > deadline or self.shutdown.wait(0.5):
                return False
        return True

    def _examine(self) -> Findings:
        return repair.examine(self.redis, self.keys, self.group, mend=self.given.repair)

    def _forget(self, findings: Findings, accounts: set[str]) -> None:
        """What was deleted here by hand and is in none of the account's mailboxes any more, where all of them were looked at."""
        left = self._examine().dangling
        gone = {email_id: place for email_id, place in left.items() if findings.dangling.get(email_id) == place}
        if not gone:
            return
        if self.failed or self.given.since or self.given.mailbox or self.given.username:
            say(
                f"{len(gone)} mails were deleted by hand and not found again; only a look at all mailboxes can tell that they are gone"
            )
            self.failed = True
            return
        gone = {
            email_id: place
            for account in accounts
            for email_id, place in gone.items()
            if email_id in findings.dangling_of(account)
        }
        count = repair.forget(self.redis, self.keys, self.group, gone)
        if count:
            findings.found["forgotten"] = count
            say(f"{count} mails were deleted by hand, here and from their mailboxes: they are forgotten")
        others = self._examine().dangling
        if others:
            say(f"{len(others)} mails were deleted by hand, of accounts that are not read here: nothing was changed")
            self.failed = True

    def _say_findings(self, findings: Findings) -> None:
        wrong = bool(findings.found or findings.miscount)
        self.failed |= wrong and not findings.mended
        if not sys.stdout.isatty():
            print(
                json.dumps(
                    {
                        "redis": dict(findings.found),
                        "counters_off_by": findings.miscount,
                        "mended": findings.mended,
                        "ok": not self.failed,
                    }
                )
            )
            return
        for line in findings.lines():
            print(f"Redis: {line}{'; mended' if findings.mended else '; --repair mends it'}")
        if not wrong:
            print("Redis: index, stream, pending list and counters agree")


@contextmanager
def server(settings: Settings, shutdown: Shutdown, *, repair: bool) -> Iterator[RedisClient]:
    """The Redis that is there; only to repair one is waited for, or started."""
    if repair:
        with open_redis(settings, shutdown) as redis:
            yield redis
        return
    found = existing_redis(settings)
    if found is None:
        raise RedisUnavailable("no Redis answers: nothing can be looked at")
    with found:
        yield found


def main() -> int:
    given = arguments().parse_args()
    flags: Mapping[str, Any] = {
        "GMAIL_USERNAME": tuple(given.username) if given.username else None,
        "MAILBOXES": tuple(given.mailbox) if given.mailbox else None,
    }

    def run(settings: Settings, shutdown: Shutdown) -> int:
        shutdown.on_signals()
        try:
            found = accesses(load_accounts(settings.mail, flags), SYSTEM, keep=given.repair)
            with server(settings, shutdown, repair=given.repair) as redis:
                return Audit(settings, redis, shutdown, given).run(found)
        except NoUsableToken as error:
            say(str(error))
            return 3

    return run_command(run, log_level="WARNING", flags=flags)


if __name__ == "__main__":
    sys.exit(main())
