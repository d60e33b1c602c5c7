"""Intake beside an archive that is full, away or cut off half-way: mail waits in IMAP, and what is published can be read."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from src.common.archive import Archive, Folder, ref_of
from src.mail.record import gmail_email_id
from src.producer.archiver import KEPT_BYTES
from src.sandbox.server import Sandbox
from tests.integration.test_commands import finished
from tests.support.daemons import Daemon
from tests.support.once import read_once, reading
from tests.support.pipeline import DEADLINE, Pipeline
from tests.support.processes import family
from tests.support.proxy import FaultProxy
from tests.support.wait import until

SMALL, LARGE = 20_000, 100_000  # bytes of a mail that still finds room on a full disk, and of one that does not
FULL = 50_000

fills_disks = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="no prlimit here: it makes the disk full for one process"
)


def archivers_of(producer: Daemon) -> list[int]:
    """The process that keeps its raw mail: one, or none before the first mail and between one that ended and the next."""
    found = []
    for pid in family(producer.pid):
        with suppress(OSError):  # ended meanwhile
            if b"src.producer.archiver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def fill_disk(producer: Daemon, limit: int = FULL) -> None:
    """No raw mail that is kept may be larger than `limit` bytes from now on, as if the disk were full."""
    for pid in archivers_of(producer):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def handed_over(producer: Daemon) -> int:
    """Bytes of raw mail that it shares with its archiver now."""
    found = 0
    for handle in Path(f"/proc/{producer.pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if str(handle.readlink()).startswith("/memfd:raw mail"):
                found += handle.stat().st_size
    return found


def body(size: int) -> bytes:
    return b"0123456789abcdef\r\n" * (size // 18)


def assert_kept(pipeline: Pipeline, raws: dict[str, bytes]) -> None:
    """Each of these mails (email_id → raw) stands in the stream once, and its raw mail in the archive, byte for byte."""
    archive = Archive(Folder(pipeline.tmp / "data" / "raw"))
    entries = list(pipeline.books().stream.values())
    assert sorted(fields["email_id"] for fields in entries) == sorted(raws)
    for fields in entries:
        assert archive.get(json.loads(fields["record"])["raw_ref"]) == raws[fields["email_id"]]


@fills_disks
def test_a_full_disk_pauses_intake(pipeline: Pipeline) -> None:
    """A mail that finds no room waits in IMAP with all behind it, and intake says so; with room again all are published and kept."""
    with pipeline.producer() as producer:
        pipeline.deliver("fits", body=body(SMALL))
        pipeline.wait_for_uid(1)
        fill_disk(producer)
        pipeline.deliver("does not fit", body=body(LARGE))
        pipeline.deliver("stands behind it", body=body(SMALL))
        producer.wait_for("INBOX: intake waits: raw mail cannot be kept: .*raw is full .* Make room there", DEADLINE)
        producer.wait_for("INBOX: PAUSED, 1 published", DEADLINE)
        assert (len(pipeline.books().stream), pipeline.last_uid()) == (1, "1")
        assert not list((pipeline.tmp / "data" / "raw" / "tmp").iterdir()), "no piece is left of what did not fit"
        fill_disk(producer, resource.RLIM_INFINITY)
        pipeline.wait_for_uid(3)
        producer.wait_for("INBOX: the archive is there again", DEADLINE)
    pipeline.assert_accounted(waiting=pipeline.delivered)
    archive = Archive(Folder(pipeline.tmp / "data" / "raw"))
    refs = [json.loads(fields["record"])["raw_ref"] for fields in pipeline.books().stream.values()]
    assert [len(archive.get(ref)) > SMALL for ref in refs] == [True, True, True]


@fills_disks
def test_an_archiver_that_dies_delays_intake_and_no_more(pipeline: Pipeline) -> None:
    """Killed with a group in hand: said, started anew, each mail is there once and kept. It ends when its producer is killed."""
    with pipeline.producer(PRODUCER_BATCH_SIZE="5") as producer:
        pipeline.deliver("first")
        pipeline.wait_for_uid(1)
        [first] = archivers_of(producer)
        os.kill(first, signal.SIGSTOP)
        pipeline.deliver(*(f"mail {number}" for number in range(8)), body=body(KEPT_BYTES + 100_000))
        until(lambda: handed_over(producer) > KEPT_BYTES, DEADLINE, "a group is with the archiver")
        os.kill(first, signal.SIGKILL)
        producer.wait_for(r"INBOX: intake waits: raw mail cannot be kept: .* \(it was ended by signal 9\)", DEADLINE)
        pipeline.wait_for_uid(9)
        producer.wait_for("INBOX: the archive is there again", DEADLINE)
        [second] = archivers_of(producer)
        os.kill(producer.pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{second}").exists(), DEADLINE, "nobody is left behind")
    pipeline.assert_accounted(waiting=pipeline.delivered)
    archive = Archive(Folder(pipeline.tmp / "data" / "raw"))
    assert all(archive.get(json.loads(fields["record"])["raw_ref"]) for fields in pipeline.books().stream.values())


def test_an_archive_that_is_away_pauses_intake(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Its folder cannot be made: nothing is published until it can; the reason is said once."""
    pipeline.deliver("one", "two")
    in_its_place = pipeline.tmp / "data" / "raw"
    in_its_place.parent.mkdir()
    in_its_place.touch()
    with reading(pipeline) as future:
        until(lambda: "cannot be had" in caplog.text, DEADLINE, "intake says why it waits")
        assert not pipeline.books().stream
        in_its_place.unlink()
        assert future.result(DEADLINE) == 0
    assert caplog.text.count("INBOX: intake waits: raw mail cannot be kept: ") == 1
    pipeline.assert_accounted(waiting=pipeline.delivered)


def test_a_worker_that_cannot_reach_the_archive_says_so_at_start(pipeline: Pipeline) -> None:
    """No archive where it looks: said before the first mail; where the producer has kept one, nothing is said."""
    pipeline.deliver("one")
    assert read_once(pipeline) == 0
    with pipeline.worker(RAW_ARCHIVE=f"file:{pipeline.tmp}/elsewhere", WORKER_HANDLER="tests.support.handlers:obey") as worker:
        worker.wait_for(rf"WARNING +raw mail: {pipeline.tmp}/elsewhere is no archive \(yet\): .* mount it, or set RAW_ARCHIVE")
        pipeline.wait_until_settled()
    with pipeline.worker() as worker:
        worker.wait_for("reads email_ingestion_stream as group")
        assert "raw mail:" not in worker.output()
    pipeline.assert_accounted()


@fills_disks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 8))])
def test_a_first_read_under_attack(pipeline: Pipeline, sandbox: Sandbox, seed: int) -> None:
    """Producer or archiver killed, the connection cut within a mail, the disk filled, at random: each mail once, with its raw mail."""
    draw, raws = random.Random(seed), dict[str, bytes]()
    for number in range(200):
        raw = b"From: a@example.org\r\nSubject: %d\r\n\r\n" % number + body(draw.choice((500, 2_000, SMALL, LARGE)))
        sandbox.deliver(pipeline.account, raw)
        raws[gmail_email_id(pipeline.account, sandbox.ledger()[-1].gm_msgid)] = raw
    with FaultProxy(sandbox.imap_port) as proxy, ExitStack() as stack:

        def started() -> Daemon:
            return stack.enter_context(
                pipeline.producer(IMAP_PORT=str(proxy.port), PRODUCER_BATCH_SIZE="5", PRODUCER_LEASE="0.5")
            )

        def reached() -> int:
            return int(pipeline.last_uid() or 0)

        producer, mishaps = started(), ["cut", "kill", "full", "kill the archiver"]
        while reached() < len(raws):
            pipeline.wait_for_uid(min(len(raws), reached() + draw.randrange(1, 50)))
            mishap = draw.choice(mishaps)
            if mishap == "cut":
                proxy.cut_after(draw.randrange(300_000), "to_client")
                continue
            if mishap == "kill the archiver":
                for pid in archivers_of(producer):
                    os.kill(pid, signal.SIGKILL)
                continue
            if mishap == "full":
                fill_disk(producer)
                output = producer.output
                until(lambda output=output: "intake waits" in output() or reached() == len(raws), DEADLINE, "the disk is full")
            producer.kill9()
            producer = started()
        producer.wait_for("producer reads", DEADLINE)
        assert producer.terminate() == 0
    assert_kept(pipeline, raws)
    own = f"producer_state:{pipeline.account}:INBOX"
    assert pipeline.client.mget(f"{own}:last_uid", f"{own}:email_count") == ["200", "200"]


def test_reads_from_time_to_time_remove_raw_mail_as_a_daemon_does(pipeline: Pipeline) -> None:
    """--once from cron: what nobody needs any more goes, what is unfinished stays; the next one within six hours leaves it at that."""
    pipeline.deliver("unfinished")
    finished(pipeline.producer("--once"))
    root = pipeline.tmp / "data" / "raw"
    [kept] = root.glob("?/*")
    archive = Archive(Folder(root))
    old = root / archive.put(b"nobody's").removeprefix("sha256:")[0] / ref_of(b"nobody's").removeprefix("sha256:")
    for file in (kept, old):
        os.utime(file, (0, 0))
    assert "files removed" not in finished(pipeline.producer("--once"))
    os.utime(pipeline.tmp / "data" / "swept", (0, 0))
    assert "raw mail: 1 files removed, 1 still needed" in finished(pipeline.producer("--once"))
    assert list(root.glob("?/*")) == [kept]
    pipeline.assert_accounted(waiting=pipeline.delivered)
