"""acquire, publish, missing and the marker file: every verdict, with all that stands in Redis before and after."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from src.common.exceptions import ConfigurationError, DiskUnavailable, ScriptRefused
from src.common.keys import escaped
from src.producer.plan import Marker, State
from src.producer.state_manager import Held, Identity, Lease, Mail, MarkerFile, Published, StateManager
from tests.support.fake import DAY, DONE, Store, fields_of, flat

NOW = datetime(2026, 2, 1, tzinfo=UTC)
M1, M2, M3 = "gm:a:1", "gm:a:2", "gm:a:3"
HERE = "producer_state:a:INBOX"

FIRST = State(7, 0, "2026-01-25T00:00:00Z", 2, first_complete=False)
SECOND = replace(FIRST, last_uid=2, passed=3)


def manager(store: Store, nonce: str = "p1") -> StateManager:
    return StateManager(store.redis, store.keys, "a", "INBOX", nonce)


def owner(store: Store, nonce: str = "p1") -> StateManager:
    """A manager that holds the lease."""
    states = manager(store, nonce)
    assert isinstance(states.acquire(60), Lease)
    return states


def mail(number: int, *, email_id: str = "", day: str = "2026-01-31") -> Mail:
    return Mail(number, fields_of(email_id or f"gm:a:{number}", day=day))


def publish(
    states: StateManager,
    mails: Sequence[Mail],
    *,
    expected: State | None = None,
    state: State = SECOND,
    batch: str = "b1",
    most_live: int = 100,
) -> Published:
    return states.publish(mails, batch=batch, expected=expected, state=state, now=NOW, most_live=most_live)


def intake(store: Store) -> dict[str, Any]:
    """What stands in Redis of how far the mailbox was read."""
    strings = {
        name: store.redis.call("GET", f"{HERE}:{name}") for name in ("uidvalidity", "last_uid", "last_poll", "email_count")
    }
    fence = {name: value for name, value in store.redis.hash(f"{HERE}:intake").items() if name not in ("until", "lease")}
    return {name: value for name, value in strings.items() if value is not None} | fence


# the lease


def test_the_first_producer_gets_the_lease_and_knows_nothing(store: Store) -> None:
    """Absent state is None, not a state of zeros."""
    assert manager(store).acquire(60) == Lease(1, None)
    assert intake(store) == {"owner": "p1", "epoch": "1"}


def test_a_second_producer_is_told_how_long_to_wait_and_what_is_known(store: Store) -> None:
    """Nothing changes hands while the lease is held."""
    publish(owner(store), [mail(1)], state=SECOND)
    answer = manager(store, "p2").acquire(30)
    assert isinstance(answer, Held)
    assert 0 < answer.seconds <= 60
    assert answer.state == SECOND
    assert intake(store)["owner"] == "p1"


def test_renewing_is_no_change_of_owner(store: Store) -> None:
    """The epoch stays; the time starts anew."""
    states = manager(store)
    states.acquire(0.001)
    first = int(store.redis.hash(f"{HERE}:intake")["until"])
    assert states.acquire(60) == Lease(1, None)
    assert int(store.redis.hash(f"{HERE}:intake")["until"]) > first


def test_who_waits_sees_each_renewal(store: Store) -> None:
    """The end of the lease is told to the microsecond: another one after a renewal, the same one without."""
    states, standby = owner(store), manager(store, "p2")
    seen = [standby.acquire(60), standby.acquire(60)]
    states.acquire(60)
    seen.append(standby.acquire(60))
    assert [answer.until == seen[0].until for answer in seen if isinstance(answer, Held)] == [True, True, False]


def test_a_lease_that_ran_out_is_taken_over_with_a_new_epoch(store: Store) -> None:
    """The state goes with it."""
    publish(owner(store), [mail(1)], state=SECOND)
    store.redis.call("HSET", f"{HERE}:intake", "until", 1)
    assert manager(store, "p2").acquire(60) == Lease(2, SECOND)
    assert intake(store)["owner"] == "p2"


def test_a_lease_that_ends_after_its_own_length_is_not_held(store: Store) -> None:
    """The server's clock stepped back: `until` is further away than the lease is long."""
    manager(store).acquire(60)
    until = int(store.redis.hash(f"{HERE}:intake")["until"])
    store.redis.call("HSET", f"{HERE}:intake", "until", until + 3_600_000_000)
    assert manager(store, "p2").acquire(60) == Lease(2, None)


def test_a_lease_let_go_is_free_at_once(store: Store) -> None:
    """A standby need not wait for its end."""
    owner(store).let_go()
    assert manager(store, "p2").acquire(60) == Lease(2, None)


def test_nobody_can_let_go_of_anothers_lease(store: Store) -> None:
    owner(store)
    manager(store, "p2").let_go()
    assert isinstance(manager(store, "p2").acquire(60), Held)
    manager(store, "p3").let_go()
    assert intake(store) == {"owner": "p1", "epoch": "1"}


def test_letting_go_of_a_lease_that_ran_out_takes_nothing(store: Store) -> None:
    """A zombie's goodbye: the mailbox belongs to whoever acquires it next."""
    owner(store)
    store.redis.call("HSET", f"{HERE}:intake", "until", 1)
    manager(store, "p2").let_go()
    assert intake(store) == {"owner": "p1", "epoch": "1"}


def test_a_request_to_look_again_reaches_the_owner_until_it_is_done(store: Store) -> None:
    """--resync-from, asked by another process, also before the mailbox was ever read."""
    assert manager(store, "asker").request_look("2026-01-15") == "2026-01-15"
    states = manager(store)
    assert states.acquire(60) == Lease(1, None, "2026-01-15")
    publish(states, [])
    assert states.acquire(60) == Lease(1, SECOND, "2026-01-15")
    assert states.look_done("2026-01-15") == ""
    assert states.acquire(60) == Lease(1, SECOND, "")


def test_requests_to_look_again_wait_for_each_other(store: Store) -> None:
    """Each stands until it is done, once, in the order they came. What is asked again while it may be under way stands once more; what was
    done already is not struck out a second time."""
    states = manager(store)
    for request in ("2026-03-01", "late:2026-01-15", "late:2026-01-15", "2026-03-01", "2026-03-01"):
        states.request_look(request)
    assert states.requested() == "2026-03-01,late:2026-01-15,2026-03-01"
    assert states.look_done("2026-03-01") == "late:2026-01-15,2026-03-01"
    assert states.look_done("2026-03-01") == "late:2026-01-15,2026-03-01"
    assert states.look_done("late:2026-01-15") == "2026-03-01"
    assert states.look_done("2026-03-01") == states.requested() == ""
    assert intake(store) == {}


def test_bytes_are_counted_by_account_and_day_and_forgotten(store: Store) -> None:
    """All mailboxes of an account share its budget; the counter expires by itself."""
    inbox, other = manager(store), StateManager(store.redis, store.keys, "a", "Other", "p2")
    assert [inbox.spend(0, NOW), inbox.spend(500, NOW), other.spend(70, NOW)] == [0, 500, 570]
    assert StateManager(store.redis, store.keys, "b", "INBOX", "p3").spend(1, NOW) == 1
    assert inbox.spend(5, datetime(2026, 2, 2, tzinfo=UTC)) == 5
    for key in ("producer_state:a:bytes:20260201", "producer_state:b:bytes:20260201", "producer_state:a:bytes:20260202"):
        assert 86_400 < store.redis.call("TTL", key) <= 2 * 86_400


def test_looking_writes_nothing(store: Store) -> None:
    """A dry run knows the state and leaves no key."""
    assert manager(store).look() is None
    assert store.redis.call("DBSIZE") == 0
    publish(owner(store), [], state=SECOND)
    assert manager(store, "p2").look() == SECOND


# publish


def test_publish_moves_mails_and_state_in_one_step(store: Store) -> None:
    """Entries, index, day counts; last_uid as a plain string that people read."""
    states = owner(store)
    assert publish(states, [mail(1), mail(2, day="")]) == Published("OK", (True, True), 2)
    assert store.content() == {
        "stream": {"#1": M1, "#2": M2},
        "index": {M1: "S:#1", M2: "S:#2"},
        "open": {DAY: "1", "a|INBOX|undated": "1"},
    }
    assert [fields for _, fields in store.redis.entries(store.keys.stream, count=10)] == [fields_of(M1), fields_of(M2, day="")]
    assert intake(store) == {
        "uidvalidity": "7",
        "last_uid": "2",
        "last_poll": "2026-02-01T00:00:00Z",
        "email_count": "2",
        "owner": "p1",
        "epoch": "1",
        "batch": "b1",
        "boundary": "2026-01-25T00:00:00Z",
        "horizon": "2",
        "first_complete": "0",
        "passed": "3",
        "floor": "0",
    }
    assert states.acquire(60) == Lease(1, SECOND)


def test_the_state_moves_without_mail(store: Store) -> None:
    """Passed and known mail only: no stream, no count, the state all the same."""
    assert publish(owner(store), []) == Published("OK", (), 0)
    assert store.content() == {}
    assert intake(store)["last_uid"] == "2"
    assert "email_count" not in intake(store)


def test_the_same_batch_again_says_already(store: Store) -> None:
    """Its reply was lost: one entry a mail."""
    states = owner(store)
    publish(states, [mail(1), mail(2)])
    before = store.content(), intake(store)
    assert publish(states, [mail(1), mail(2)]) == Published("ALREADY")
    assert (store.content(), intake(store)) == before


def test_another_producer_is_fenced_and_writes_nothing(store: Store) -> None:
    """Owner nonce: a zombie whose lease was taken over, and one that never had it."""
    zombie, states = owner(store, "p1"), manager(store, "p2")
    store.redis.call("HSET", f"{HERE}:intake", "until", 1)
    states.acquire(60)
    before = intake(store)
    assert publish(zombie, [mail(1)]) == Published("FENCED")
    assert publish(manager(store, "p3"), [mail(1)]) == Published("FENCED")
    assert (store.content(), intake(store)) == ({}, before)


@pytest.mark.parametrize(
    "expected",
    [
        pytest.param(None, id="absent"),
        pytest.param(replace(SECOND, last_uid=1), id="another last_uid"),
        pytest.param(replace(SECOND, uidvalidity=8), id="another uidvalidity"),
    ],
)
def test_a_state_other_than_expected_is_stale_and_nothing_is_written(store: Store, expected: State | None) -> None:
    """Compare-and-set on (uidvalidity, last_uid)."""
    states = owner(store)
    publish(states, [])
    before = intake(store)
    assert publish(states, [mail(3)], expected=expected, state=replace(SECOND, last_uid=3), batch="b2") == Published("STALE")
    assert (store.content(), intake(store)) == ({}, before)


def test_a_state_that_vanished_is_stale(store: Store) -> None:
    """FLUSHALL between two batches, and the lease taken anew: never publish on the strength of what is gone."""
    states = owner(store)
    publish(states, [])
    store.redis.call("FLUSHALL")
    states.acquire(60)
    assert publish(states, [mail(3)], expected=SECOND, state=replace(SECOND, last_uid=3), batch="b2") == Published("STALE")
    assert store.content() == {}


def test_last_uid_never_goes_back(store: Store) -> None:
    """A program error, said loudly; nothing is written. Under a new UIDVALIDITY smaller UIDs are right."""
    states = owner(store)
    publish(states, [])
    with pytest.raises(AssertionError, match="back to 1"):
        publish(states, [mail(1)], expected=SECOND, state=replace(SECOND, last_uid=1), batch="b2")
    assert (store.content(), intake(store)["last_uid"]) == ({}, "2")
    walk = State(8, 0, "", 2, first_complete=False)
    assert publish(states, [], expected=SECOND, state=walk, batch="b3").verdict == "OK"
    assert (intake(store)["uidvalidity"], intake(store)["last_uid"]) == ("8", "0")


def test_known_mail_is_not_added_again(store: Store) -> None:
    """In the stream, among the dead, done: the state moves on, the answer names what was new."""
    store.put(
        {
            "stream": {"1-0": M1},
            "index": {M1: "S:1-0", M2: "D:1-0"},
            "dlq": [(M2, "attempts", "8")],
            "open": {DAY: "2"},
            "processed": {DONE: {"3"}},
        }
    )
    mails = [mail(1), mail(2), mail(3), mail(4)]
    assert publish(owner(store), mails) == Published("OK", (False, False, False, True), 2)
    assert store.content() == {
        "stream": {"1-0": M1, "#1": "gm:a:4"},
        "index": {M1: "S:1-0", M2: "D:1-0", "gm:a:4": "S:#1"},
        "dlq": [(M2, "attempts", "8")],
        "open": {DAY: "3"},
        "processed": {DONE: {"3"}},
    }
    assert intake(store)["email_count"] == "1"


def test_mail_deleted_by_hand_comes_again(store: Store) -> None:
    """The index names an entry and a letter that are gone: both mails enter again, and each is still counted once."""
    store.put({"index": {M1: "S:1-0", M2: "D:1-0"}, "open": {DAY: "2"}})
    assert publish(owner(store), [mail(1), mail(2)]) == Published("OK", (True, True), 2)
    assert store.content() == {
        "stream": {"#1": M1, "#2": M2},
        "index": {M1: "S:#1", M2: "S:#2"},
        "open": {DAY: "2"},
    }


def test_the_same_id_twice_in_a_batch_enters_once(store: Store) -> None:
    """The same Gmail message in one folder under two UIDs."""
    assert publish(owner(store), [mail(1), mail(2, email_id=M1)]) == Published("OK", (True, False), 1)
    assert store.content() == {"stream": {"#1": M1}, "index": {M1: "S:#1"}, "open": {DAY: "1"}}


def test_a_full_stream_takes_nothing_and_the_state_stays(store: Store) -> None:
    """The mail waits in IMAP."""
    store.put({"stream": {"1-0": M1, "2-0": M2}, "index": {M1: "S:1-0", M2: "S:2-0"}, "open": {DAY: "2"}})
    before = store.content()
    states = owner(store)
    assert publish(states, [mail(3)], most_live=2) == Published("FULL", live=2)
    assert (store.content(), intake(store)) == (before, {"owner": "p1", "epoch": "1"})
    assert publish(states, [mail(3)], most_live=3) == Published("OK", (True,), 3)


def test_fullness_counts_entries_not_known_mail_nor_dead_letters(store: Store) -> None:
    """Known mail is taken out of the batch first: a full stream does not hold up the state, nor do the dead."""
    store.put(
        {
            "stream": {"1-0": M1},
            "index": {M1: "S:1-0", M2: "D:1-0", M3: "D:2-0"},
            "dlq": [(M2, "attempts", "8"), (M3, "attempts", "8")],
            "open": {DAY: "3"},
        }
    )
    states = owner(store)
    assert publish(states, [mail(1), mail(2)], most_live=1).verdict == "OK"
    more = replace(SECOND, last_uid=4)
    assert publish(states, [mail(4), mail(5)], expected=SECOND, state=more, batch="b2", most_live=2) == Published(
        "OK", (True, True), 3
    ), "one batch may overshoot"


def test_a_stream_key_of_another_type_is_named(store: Store) -> None:
    """The user's own key is left alone."""
    store.redis.call("SET", store.keys.stream, "mine")
    with pytest.raises(ConfigurationError, match="STREAM_NAME=stream: that key is a string"):
        publish(owner(store), [mail(1)])
    assert store.redis.call("GET", store.keys.stream) == "mine"
    assert "last_uid" not in intake(store)


def test_a_mail_too_wide_for_lua_refuses_the_batch_before_the_first_write(store: Store) -> None:
    """Scripts do not roll back: the good mail in front of it must not stay behind without its state."""
    wide = Mail(2, fields_of(M2) | {f"name{number}": "" for number in range(1001)})
    with pytest.raises(ScriptRefused, match="1,000 fields"):
        publish(owner(store), [mail(1), wide])
    assert (store.content(), intake(store)) == ({}, {"owner": "p1", "epoch": "1"})


def test_a_batch_of_500_over_many_days_goes_in_whole(store: Store) -> None:
    """The largest batch there is fits Lua's limits; every mail is counted under its day."""
    mails = [mail(number, day=f"2025-{1 + number % 12:02d}-{1 + number % 28:02d}") for number in range(1, 501)]
    published = publish(owner(store), mails, state=replace(SECOND, last_uid=500), most_live=1)
    assert published == Published("OK", (True,) * 500, 500)
    content = store.content()
    assert len(content["stream"]) == len(content["index"]) == sum(map(int, content["open"].values())) == 500
    assert intake(store)["last_uid"] == "500"
    assert manager(store).open_days() == list(content["open"])


# missing


def test_missing_names_what_is_known_nowhere(store: Store) -> None:
    """Unfinished, dead and done mail is known; the same number on another day is not."""
    store.put(
        {
            "stream": {"1-0": M1},
            "index": {M1: "S:1-0", M2: "D:1-0"},
            "dlq": [(M2, "attempts", "8")],
            "open": {DAY: "2"},
            "processed": {DONE: {"3", "4"}},
        }
    )
    before = store.content()
    asked = [Identity(f"gm:a:{number}", "2026-01-31T23:59:59Z") for number in (1, 2, 3, 5)]
    asked += [Identity("gm:a:4", "2026-01-30T00:00:00Z"), Identity("gm:a:4", "2026-01-31T00:00:00Z"), Identity("gm:a:6", "")]
    assert manager(store).missing(asked, "a") == [3, 4, 6]
    assert manager(store).missing([], "a") == []
    assert store.content() == before


# traces


def test_traces_of_a_mailbox_that_redis_never_saw(store: Store) -> None:
    assert manager(store).traces() is None


def test_traces_of_unfinished_mail_name_its_oldest_day(store: Store) -> None:
    """Also where the state is gone and the processed sets tell of later days."""
    fields = flat({"a|INBOX|20260115": "1", "a|INBOX|20260102": "1", "a|Other|20250101": "1", "b|INBOX|20240101": "1"})
    store.redis.call("HSET", store.keys.open, *fields)
    store.redis.call("SADD", f"stream:processed:{DONE}", "1")
    assert manager(store).traces() == "2026-01-02"


def test_traces_of_finished_mail_name_the_newest_day(store: Store) -> None:
    """All that was seen was done: reading goes on from there."""
    for key in ("stream:processed:a:20260102", "stream:processed:a:20260115", "stream:processed:ab:20260120"):
        store.redis.call("SADD", key, "1")
    store.redis.call("SADD", "stream:processed:a:undated", "1")
    assert manager(store).traces() == "2026-01-15"


def test_a_further_mailbox_of_a_known_account_is_new(store: Store) -> None:
    """The account's processed sets tell of its other mailboxes."""
    publish(owner(store), [])
    store.redis.call("SADD", f"stream:processed:{DONE}", "1")
    other = StateManager(store.redis, store.keys, "a", "Other", "p1")
    assert other.traces() is None


def test_a_mailbox_that_lived_without_any_dated_mail_is_read_from_the_beginning(store: Store) -> None:
    """Only its poll time is left: any day may be missing."""
    store.redis.call("SET", f"{HERE}:last_poll", "2026-02-01T00:00:00Z")
    assert manager(store).traces() == ""


def test_an_account_with_glob_characters_finds_only_its_own_keys(store: Store) -> None:
    """`*` in an address is a letter, not a pattern."""
    store.redis.call("SADD", "stream:processed:axb:20260102", "1")
    states = StateManager(store.redis, store.keys, "a*b", "INBOX", "p1")
    assert states.traces() is None
    store.redis.call("SADD", "stream:processed:a*b:20260103", "1")
    assert states.traces() == "2026-01-03"
    assert escaped("a*b?[c]\\") == "a\\*b\\?\\[c\\]\\\\"


# the marker file


def test_the_marker_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Whatever the names hold: a folder's slash, an address's slash."""
    for account, mailbox in (("a@example.org", "INBOX"), ("a/../b", "[Gmail]/All Mail"), ("a@example.org", "../INBOX")):
        file = MarkerFile(tmp_path, account, mailbox)
        assert file.read() is None
        marker = Marker(replace(SECOND, passed=len(mailbox)), "2026-01-31", 7)
        file.write(marker)
        assert MarkerFile(tmp_path, account, mailbox).read() == marker
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(path.is_relative_to(tmp_path / "markers") for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": {}, "oldest": ""}', '{"state": {"last": 1}, "oldest": ""}'])
def test_a_damaged_marker_is_an_error_not_a_new_start(tmp_path: Path, content: str) -> None:
    """Guessing could lose mail: one line says what to do."""
    file = MarkerFile(tmp_path, "a", "INBOX")
    file.write(Marker(SECOND, ""))
    [path] = tmp_path.rglob("*.json")
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="is damaged") as caught:
        file.read()
    assert "\n" not in str(caught.value)


def test_a_marker_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one is written aside first, and what was written of it makes room again."""
    file = MarkerFile(tmp_path, "a", "INBOX")
    file.write(Marker(SECOND, "2026-01-01"))
    [path] = tmp_path.rglob("*.json")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskUnavailable, match=r"INBOX\.json cannot be written \(No space left on device\): make room"):
        file.write(Marker(SECOND, "2026-02-02"))
    assert json.loads(path.read_text())["oldest"] == "2026-01-01"
    assert list(path.parent.iterdir()) == [path]
