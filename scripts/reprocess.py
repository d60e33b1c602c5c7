"""Finished mail once more, as a new life: after a handler's bug. `python scripts/reprocess.py --help`."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import _path  # noqa: F401  # before the project's own modules
from _bulk import Pace, Progress, agreed, counted, day, rate, report
from _command import run_command, say
from config.accounts import load_accounts
from config.settings import Settings
from src.common.archive import open_archive
from src.common.batch import split
from src.common.clock import SYSTEM
from src.common.embedded import open_redis
from src.common.exceptions import (
    ArchiveMissing,
    ConfigurationError,
    ImapUnavailable,
    MailboxMissing,
    ReauthRequired,
    Transient,
)
from src.common.keys import Keys
from src.common.redis_client import Fields, RedisClient
from src.common.shutdown import Shutdown
from src.imap.imap_client import ImapMailbox
from src.mail.record import member_of
from src.producer import reprocess
from src.producer.daemon import Access, NoUsableToken, accesses, imap_endpoint
from src.producer.reader import FETCH_BYTES, PUBLISH_BYTES
from src.producer.reprocess import Finished, Located, Wanted
from src.worker import processed

FULL_SECONDS = 1.0
MEANINGS = {
    "ALREADY": ("already", "were brought back by this run before"),
    "LIVE": ("live", "are unfinished: not touched"),
    "DEAD": ("dead", "are dead letters: not touched (python scripts/dlq.py replay brings them back)"),
    "UNKNOWN": ("unknown", "were never finished, as far as Redis knows: not touched (the producer brings them)"),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Send finished mail through the handlers once more, as a new life: after a handler's bug.",
        epilog="The days are those of INTERNALDATE (UTC). Effects outside Redis happen again, under the same idempotency key. "
        "Exit code: 0 done, 1 something is left undone, 2 a wrong argument or setting. docs/dead-letters.md tells more.",
    )
    parser.add_argument("--since", type=day, required=True, metavar="DATE", help="first day (2026-01-31)")
    parser.add_argument("--until", type=day, required=True, metavar="DATE", help="last day, included")
    parser.add_argument("--account", default="", metavar="U", help="of this account")
    parser.add_argument("--sender", default="", metavar="A", help="from this address, or with @example.org from this domain")
    parser.add_argument("--handler", default="", metavar="H", help="finished by this handler, as far as the results reach back")
    parser.add_argument(
        "--source",
        choices=("auto", "archive", "imap"),
        default="auto",
        help="archive: what the results name, from the raw archive. imap: from the mailboxes. auto: the first, then the second "
        "for what it lacks (default)",
    )
    parser.add_argument("--rate", type=rate, metavar="R", help="at most so many: 5/s, 100/m")
    parser.add_argument("--run", metavar="NAME", help="go on with an interrupted run: it brings no mail back twice")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


Member = tuple[str, str]  # (account, member of a processed set)


def member(mail: Finished) -> Member:
    return mail.account, member_of(mail.email_id)


class Plan:
    """What is to come back: `archived` by the results; `lacking` is what IMAP is to be asked for.

    `untold`: how much finished mail of these days is no longer in the results (of any sender and handler).
    """

    def __init__(self, redis: RedisClient, keys: Keys, wanted: Wanted, source: str) -> None:
        latest: dict[str, Finished] = {}
        for mail in reprocess.results(redis, keys):
            if mail.outcome == "discarded" or wanted.day(mail.internal_date):
                latest[mail.email_id] = mail
        chosen = [mail for mail in latest.values() if wanted.takes(mail)]
        self.archived = [mail for mail in chosen if mail.raw_ref and source != "imap"]
        kept = {mail.email_id for mail in self.archived}
        self.lacking = {member(mail) for mail in chosen if mail.email_id not in kept}
        told, days, untold = {member(mail) for mail in latest.values()}, set(wanted.days), set[Member]()
        for key, account, on in processed.sets(redis, keys, None):
            if on in days and wanted.of_account(account):
                untold |= {(account, name) for name in redis.call("SMEMBERS", key)} - told
        self.untold = len(untold)
        if not wanted.handler:  # who handled it, nobody can tell
            self.lacking |= untold
        if source == "archive":
            self.lacking.clear()


class Run:
    """Brings back what a plan names. `answers`: how many of each; `left`: why something is left undone."""

    def __init__(
        self, settings: Settings, redis: RedisClient, wanted: Wanted, plan: Plan, given: argparse.Namespace, shutdown: Shutdown
    ) -> None:
        self.settings, self.redis, self.wanted, self.plan, self.given = settings, redis, wanted, plan, given
        self.shutdown = shutdown
        self.keys = Keys(settings.stream.name)
        self.name: str = given.run or f"{SYSTEM.wall():%Y%m%d}-{secrets.token_hex(3)}"
        place = settings.run.raw_archive
        self.archive = open_archive(place.get_secret_value() if place else None, settings.run.data_dir)
        self.pace = Pace(given.rate, shutdown, SYSTEM)
        self.progress = Progress(len(plan.archived) + len(plan.lacking), SYSTEM)
        self.answers: Counter[str] = Counter()
        self.left: list[str] = []

    def look(self) -> None:
        """Count what would be done; changes nothing."""
        for first in range(0, len(self.plan.archived), 100):
            self.answers.update(reprocess.judge(self.redis, self.keys, self.plan.archived[first : first + 100]))
        for access, mailbox in self._folders(keep=False):
            with self._session(access, mailbox) as session:
                for mail, _ in self._in_folder(session, access, mailbox):
                    self.answers["OK"] += mail is not None

    def do(self) -> None:
        """Raises Transient where something is away: then the run can be gone on with."""
        try:
            self._from_archive()
            for access, mailbox in self._folders(keep=True):
                self._from_folder(access, mailbox)
            if self.plan.lacking and not self.left and not self.shutdown.requested:
                asked = (
                    "not in the archive"
                    if self.given.source == "archive"
                    else "neither in the archive nor in the folders that are read"
                )
                self.left.append(f"{len(self.plan.lacking)} finished mails are {asked}")
        finally:
            self.progress.end()
        if self.shutdown.requested:
            self.left.append("stopped as asked")

    # from the archive

    def _from_archive(self) -> None:
        rest = iter(self.plan.archived)
        while not self.shutdown.requested and (group := list(self._group(rest))):
            found = [(mail, raw) for mail, raw in group if raw is not None]
            self._keep([raw for _, raw in found])  # anew, so that no sweep takes it before the stream refers to it again
            self.plan.lacking |= {member(mail) for mail, raw in group if raw is None}
            self._publish(
                [reprocess.entry_from_archive(mail, raw, new_id=secrets.token_hex(8), now=SYSTEM.wall()) for mail, raw in found]
            )

    def _group(self, rest: Iterator[Finished]) -> Iterator[tuple[Finished, bytes | None]]:
        """The next of `rest`, each with what `_raw` has of it: a page, or fewer where they reach FETCH_BYTES."""
        size = 0
        for mail in islice(rest, self.pace.page):
            raw = self._raw(mail)
            yield mail, raw
            size += len(raw or b"")
            if size >= FETCH_BYTES:
                return

    def _raw(self, mail: Finished) -> bytes | None:
        """None where the archive has it no more."""
        try:
            return self.archive.get(mail.raw_ref) if self.archive else None
        except ArchiveMissing:
            return None

    # from IMAP

    def _folders(self, *, keep: bool) -> Iterator[tuple[Access, str]]:
        """The folders to look in, as long as something is lacking."""
        if not self.plan.lacking or self.given.source == "archive":
            return
        try:
            found = accesses(load_accounts(self.settings.mail), SYSTEM, keep=keep)
        except NoUsableToken as error:
            self.left.append(f"{len(self.plan.lacking)} finished mails are not in the archive, and IMAP cannot be asked: {error}")
            return
        for access in found:
            if self.wanted.of_account(access.account.username):
                yield from ((access, mailbox) for mailbox in access.account.mail.mailboxes if self.plan.lacking)

    def _session(self, access: Access, mailbox: str) -> ImapMailbox:
        endpoint, secret = imap_endpoint(access.account.mail), access.credentials.access_token()
        return ImapMailbox(endpoint, access.account.username, mailbox, secret)

    def _from_folder(self, access: Access, mailbox: str) -> None:
        """A session that ends on the way is opened again, as long as each brings something."""
        while self.plan.lacking and not self.shutdown.requested:
            before = len(self.plan.lacking)
            try:
                with self._session(access, mailbox) as session:
                    return self._from_session(session, access, mailbox)
            except ImapUnavailable as error:
                if len(self.plan.lacking) == before:
                    raise
                print(f"{access.account.username}/{mailbox}: {error}; connecting again", file=sys.stderr)
            except (ReauthRequired, MailboxMissing, ConfigurationError) as error:
                self.left.append(f"{access.account.username}/{mailbox}: {error}")
                return None
        return None

    def _from_session(self, session: ImapMailbox, access: Access, mailbox: str) -> None:
        account, mail = access.account.username, access.account.mail
        looked_at = self._in_folder(session, access, mailbox)
        while not self.shutdown.requested and (page := list(islice(looked_at, self.pace.page))):
            wanted = [located for located, _ in page if located]
            entries = [
                reprocess.entry_from_imap(
                    session, account, mailbox, located, raw, raw_ref, new_id=secrets.token_hex(8), now=SYSTEM.wall()
                )
                for located, raw, raw_ref in reprocess.fetched(
                    session, wanted, most_bytes=mail.max_message_bytes, keep=self._keep
                )
            ]
            self._publish(entries)
            if len(entries) < len(wanted):
                self.left.append(f"{account}/{mailbox}: the server gave no data of {len(wanted) - len(entries)} mails")
            self.plan.lacking -= {name for _, name in page}

    def _in_folder(self, session: ImapMailbox, access: Access, mailbox: str) -> Iterator[tuple[Located | None, Member]]:
        """Each mail of the folder that is lacking; without its place where its sender is not the one that is wanted."""
        account, scope = access.account.username, access.account.mail.dedup_scope
        for mail in reprocess.in_folder(session, account, mailbox, scope, self.wanted):
            name = (account, member_of(mail.email_id))
            if name in self.plan.lacking:
                yield mail if reprocess.is_sent_by(session, mail, self.wanted.sender) else None, name

    def _keep(self, raws: Sequence[bytes]) -> list[str]:
        return self.archive.put_all(raws) if self.archive else [""] * len(raws)

    # into the stream

    def _publish(self, entries: Sequence[Fields]) -> None:
        most_live, said = self.settings.stream.maxlen, False
        for waiting in split(entries, lambda fields: len(fields["record"]), most=self.pace.page, most_bytes=PUBLISH_BYTES):
            while waiting:
                answers = reprocess.bring_back(self.redis, self.keys, self.name, waiting, most_live=most_live)
                self.answers.update(answer for answer in answers if answer != "FULL")
                left = [fields for fields, answer in zip(waiting, answers, strict=True) if answer == "FULL"]
                self.progress.advance(len(waiting) - len(left))
                waiting = left
                if waiting and not said:
                    said = True
                    print(f"the stream is full (STREAM_MAXLEN={most_live}): waiting for room", file=sys.stderr)
                if waiting and self.shutdown.wait(FULL_SECONDS):
                    return
        self.pace.wait(len(entries))


def act(settings: Settings, redis: RedisClient, given: argparse.Namespace, shutdown: Shutdown) -> int:
    wanted = Wanted(given.since, given.until, given.account, given.sender, given.handler)
    plan = Plan(redis, Keys(settings.stream.name), wanted, given.source)
    run = Run(settings, redis, wanted, plan, given, shutdown)
    asked = len(plan.lacking)
    if given.handler and plan.untold:
        print(
            f"{plan.untold} finished mails of these days are no longer in the results: nobody can tell their handler, they are left out",
            file=sys.stderr,
        )
    if given.dry_run:
        run.look()
        return summary(run, "would be brought back", "would_bring_back")
    if not plan.archived and not asked:
        report({"run": "", "brought_back": 0}, "no finished mail is meant: nothing to do")
        return 0
    question = (
        f"Handle up to {len(plan.archived) + asked} finished mails again ({len(plan.archived)} from the archive, up to {asked} from "
        "IMAP)? Their effects outside Redis happen again."
    )
    if not agreed(question, yes=given.yes):
        print("nothing was changed", file=sys.stderr)
        return 1
    shutdown.on_signals()  # from here on Ctrl-C ends between two pages
    print(f"run {run.name}: if it is interrupted, go on with --run {run.name}", file=sys.stderr)
    try:
        run.do()
    except Transient as error:
        run.left.append(str(error))
    if run.left:
        run.left.append(f"to go on: the same line with --run {run.name}")
    return summary(run, "brought back", "brought_back")


def summary(run: Run, done: str, key: str) -> int:
    counts: dict[str, object] = {name: run.answers[answer] for answer, (name, _) in MEANINGS.items()}
    report(
        {"run": run.name, key: run.answers["OK"], **counts, "left": run.left},
        f"{counted(run.answers['OK'], 'finished mail')} {done}",
        *(f"{run.answers[answer]} {meaning}" for answer, (_, meaning) in MEANINGS.items() if run.answers[answer]),
    )
    for line in run.left:
        say(line)
    return 1 if run.left else 0


def main() -> int:
    parser = arguments()
    given = parser.parse_args()
    if given.since > given.until:
        parser.error("--since is after --until")

    def run(settings: Settings, shutdown: Shutdown) -> int:
        with open_redis(settings, shutdown) as redis:
            return act(settings, redis, given, shutdown)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
