"""Every guard taken out once, to see that the tests notice: `python -m tests.load.mutants [--only NAME]`.

Each guard is a line of the program without which mail would be lost, doubled or held up. The tree is copied (never changed), the guard is
replaced in the copy, and the tests that ought to notice run there; if they do not, the wider ones. A guard that nothing notices alone
must name the other that covers it: then both are taken out together. Exit code 1: one goes unnoticed, or does not stand in its file.
"""

from __future__ import annotations

import argparse
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LUA = "src/common/lua"
UNIT = "tests/unit/test_"
WIDER = (
    *(f"{UNIT}{name}.py" for name in ("idempotency", "dlq", "recovery", "state_manager", "consume", "plan", "redis_client")),
    "tests/integration/test_transitions_model.py",
    "tests/integration/test_crash_points.py",
    "tests/integration/test_simulation.py",
)
# Tests that take guards out themselves look for their text; what is looked for here is what the others see.
NOT = "not guard_taken_out and not same_story"
NEVER, ALWAYS = "if false then", "if true then"
FENCE = "if owned[mail.sid] ~= mail.count then"
SECONDS = 900.0


@dataclass(frozen=True)
class Guard:
    """`text` stands once in `file`. `tests` ought to notice; `selected` as for pytest's -k. `covered`: another guard's name."""

    name: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]
    selected: str = ""
    covered: str = ""


def lua(script: str, name: str, text: str, instead: str, tests: str, covered: str = "") -> Guard:
    return Guard(f"{script}: {name}", f"{LUA}/{script}.lua", text, instead, (f"{UNIT}{tests}.py",), covered=covered)


GUARDS = (
    # intake
    lua("acquire", "another's lease is respected", "now < expires and expires <= now + length", "false", "state_manager"),
    lua("acquire", "a lease in the far future is none", "and expires <= now + length", "", "state_manager"),
    lua("publish", "owner", "if state[1] ~= ARGV[1] then", NEVER, "state_manager"),
    lua("publish", "compare-and-set", "if uidvalidity ~= ARGV[3] or last_uid ~= ARGV[4] then", NEVER, "state_manager"),
    lua("publish", "repeated call", "if state[2] == ARGV[2] and", "if false and", "state_manager"),
    lua("publish", "last_uid never back", "tonumber(ARGV[6]) < tonumber(last_uid)", "false", "state_manager"),
    lua("publish", "known in the stream", "mails[i].known = located[i]", "mails[i].known = false", "state_manager"),
    lua("publish", "known as done", "or done[i] == 1 end", "end", "state_manager"),
    lua("publish", "twice in a batch", "mails[i].known or seen[ids[i]]", "mails[i].known", "state_manager"),
    lua("publish", "FULL", "if fresh > 0 and live >= tonumber(ARGV[13]) then", NEVER, "state_manager"),
    lua("publish", "index is written", "redis.call('HSET', KEYS[7], unpack(index))", "", "state_manager"),
    lua("missing", "known in the stream", "and not located[position]", "", "state_manager"),
    Guard(
        "publish: refused when memory is full",
        f"{LUA}/publish.lua",
        "#!lua\n",
        "#!lua flags=allow-oom\n",
        ("tests/integration/test_redis_faults.py",),
        "memory",
    ),
    Guard("plan: boundary", "src/producer/plan.py", "if internal_date < state.boundary:", "if False:", (f"{UNIT}plan.py",)),
    Guard(
        "plan: above the horizon everything counts",
        "src/producer/plan.py",
        "if uid > state.horizon or not internal_date:",
        "if not internal_date:",
        (f"{UNIT}plan.py",),
    ),
    Guard(
        "plan: contiguous prefix",
        "src/producer/plan.py",
        "[uid for uid in uids if uid < absent[0]] if absent else list(uids)",
        "[uid for uid in uids if uid not in absent]",
        (f"{UNIT}plan.py",),
    ),
    Guard(
        "plan: SEARCH n:* names the last mail",
        "src/producer/plan.py",
        "above = [uid for uid in listed if uid > state.last_uid]",
        "above = list(listed)",
        (f"{UNIT}plan.py",),
    ),
    Guard(
        "plan: lost state is no first read",
        "src/producer/plan.py",
        "    if marker is not None:\n        return _lost(marker, uidvalidity, highest)\n",
        "",
        (f"{UNIT}plan.py",),
    ),
    Guard(
        "reader: the marker covers what is published",
        "src/producer/reader.py",
        "        self._cover(mails)\n",
        "",
        ("tests/integration/test_simulation.py",),
        "covered_by_the_marker",
    ),
    lua(
        "publish",
        "what was deleted by hand comes again",
        "located[i] and stands(KEYS[6], KEYS[9], located[i])",
        "located[i]",
        "state_manager",
    ),
    lua(
        "adopt",
        "another copy lives",
        "elseif location and stands(KEYS[1], KEYS[3], location) then",
        "elseif false then",
        "repair",
    ),
    lua(
        "adopt",
        "a mail that was done is not adopted",
        "KEYS[4 + tonumber(ARGV[i + 3])], ARGV[i + 2]) == 1 then",
        "KEYS[4 + tonumber(ARGV[i + 3])], ARGV[i + 2]) == 2 then",
        "repair",
    ),
    Guard(
        "plan: an older Redis is told by its epoch",
        "src/producer/plan.py",
        "if epoch < marker.epoch or (first and epoch == marker.epoch):",
        "if False:",
        (f"{UNIT}plan.py",),
    ),
    Guard(
        "redis_client: a call is sent once",
        "src/common/redis_client.py",
        "                retry=Retry(NoBackoff(), 0),\n",
        "                retry=Retry(NoBackoff(), 3),\n",
        (f"{UNIT}redis_client.py",),
    ),
    # a worker takes and begins
    lua("join", "one group", "if group[2] ~= ARGV[1] then", NEVER, "recovery"),
    lua("recover", "only after the lease", "'IDLE', ARGV[3],", "'IDLE', 0,", "recovery"),
    lua("recover", "not what I work on", "if not busy[entry[1]] and", "if", "recovery"),
    lua("promote", "fence count (RETRYCOUNT)", "'^%d+|(%d+)')) + 1", "'^%d+|(%d+)'))", "recovery"),
    lua("promote", "ZREM", "redis.call('ZREM', KEYS[3], member)", "", "recovery"),
    lua("begin", "owner", FENCE, NEVER, "idempotency"),
    lua("begin", "done before", "mail.done or (location and", "(location and", "idempotency"),
    lua(
        "begin",
        "another copy lives",
        "(location and location ~= here and stands(KEYS[1], KEYS[5], location))",
        "false",
        "idempotency",
    ),
    lua("begin", "adoption", "location ~= here and stands(KEYS[1], KEYS[5], location)", "location ~= here", "idempotency"),
    lua("begin", "adoption within a batch", "adopted[mail.id] = here", "", "idempotency"),
    lua("begin", "suspect rule", "elseif ARGV[4] == '1' then", "elseif true then", "idempotency"),
    lua("begin", "an unfinished start is seen", "if last == nil or last == tag then", ALWAYS, "idempotency"),
    lua(
        "begin", "a repeated call is no second start", "if last == nil or last == tag then", "if last == nil then", "idempotency"
    ),
    lua("begin", "poison ends", "elseif solo >= tonumber(ARGV[3]) then", "elseif false then", "idempotency"),
    Guard(
        "consume: one suspect at a time",
        "src/worker/consume.py",
        "if not self._suspects or self._alone:",
        "if not self._suspects:",
        (f"{UNIT}consume.py",),
    ),
    Guard(
        "consume: a suspect waits for its process",
        "src/worker/consume.py",
        "if not self.alone_ready():",
        "if False:",
        (f"{UNIT}consume.py",),
    ),
    Guard(
        "consume: a late answer lets go of nothing newer",
        "src/worker/consume.py",
        "if held is None or held.count != mail.count:",
        "if held is None:",
        (f"{UNIT}consume.py",),
    ),
    Guard(
        "consume: what is in hand does not begin twice",
        "src/worker/consume.py",
        "or held.count != mail.count]",
        "or True]",
        (f"{UNIT}consume.py",),
    ),
    lua("fail", "a death weighs", "(tonumber(suspicion) + DEATH)", "tonumber(suspicion)", "dlq"),
    lua("fail", "a crash keeps the mark", "or mail.verb ~= 'crash' then", "or true then", "dlq"),
    Guard(
        "step: owner",
        f"{LUA}/step.lua",
        "~= ARGV[4] then return 'LOST' end",
        "== '' then return 'LOST' end",
        ("tests/integration/test_steps.py",),
    ),
    # it holds
    lua("renew", "owner", "owned[ARGV[i]] == ARGV[i + 1] and mine or lost", "mine", "recovery"),
    lua("release", "owner", "if owned[sid] == count then", ALWAYS, "recovery"),
    lua("release", "un-count of the start", "redis.call('HDEL', KEYS[2], email_id)", "", "recovery"),
    lua("release", "un-count of a solo start", "(tonumber(solo) - 1) .. '|'", "solo .. '|'", "recovery"),
    lua("release", "claimable at once", "mine[#mine + 1] = LONG_AGO", "mine[#mine + 1] = 0", "recovery"),
    lua("reap", "never one that holds something", "consumer.pending == 0 and", "", "recovery"),
    # it ends
    lua("complete", "owner", "if owned[sid] ~= count then", NEVER, "idempotency"),
    lua("complete", "once in a call", "owned[sid] = 'settled ' .. count", "", "idempotency"),
    lua("complete", "XDEL", "redis.call('XDEL', KEYS[1], unpack(sids))", "", "idempotency"),
    lua("complete", "XACK", "redis.call('XACK', KEYS[1], ARGV[1], unpack(sids))", "", "idempotency"),
    lua("complete", "SADD", "redis.call('SADD', KEYS[6 + set], unpack(part))", "", "idempotency"),
    lua("complete", "processed ids expire", "redis.call('EXPIRE', KEYS[6 + set], ARGV[3])", "", "idempotency"),
    lua("complete", "result", "redis.call('XADD', KEYS[5],", "redis.call('XADD', KEYS[5] .. 'x',", "idempotency"),
    Guard(
        "complete: also when memory is full",
        f"{LUA}/complete.lua",
        "#!lua flags=allow-oom\n",
        "#!lua\n",
        ("tests/integration/test_redis_faults.py",),
        "memory",
    ),
    lua("fail", "owner", FENCE, NEVER, "dlq"),
    lua("fail", "once in a call", "owned[mail.sid] = 'settled ' .. mail.count", "", "dlq"),
    lua("fail", "the start is finished", "redis.call('HDEL', KEYS[3], mail.id)", "", "dlq"),
    lua("fail", "XACK", "redis.call('XACK', KEYS[1], ARGV[1], mail.sid)", "", "dlq"),
    lua("fail", "a buried entry leaves the stream", "redis.call('XDEL', KEYS[1], mail.sid)", "", "dlq"),
    lua("fail", "postponing counts no attempt", "if mail.verb ~= 'postpone' then", ALWAYS, "dlq"),
    # the dead
    lua(
        "replay",
        "a mail that lives is not replayed",
        "elseif location and not here and stands(",
        "elseif false and stands(",
        "dlq",
    ),
    lua(
        "replay",
        "a mail that was done is not replayed",
        "elseif redis.call('SISMEMBER', KEYS[6 + tonumber(ARGV[i + 3])], ARGV[i + 2]) == 1 then",
        "elseif false then",
        "dlq",
    ),
    lua("replay", "attempts begin anew", "redis.call('HDEL', KEYS[4], email_id)", "", "dlq"),
    lua("discard", "SADD", "redis.call('SADD', set, ARGV[i + 2]) == 0", "false", "dlq"),
    lua(
        "discard",
        "a mail that lives is not discarded",
        "elseif location and not here and stands(",
        "elseif false and stands(",
        "dlq",
    ),
    lua("discard", "its steps go with it", "redis.call('DEL', KEYS[5 + (i + 2) / 5])", "", "dlq"),
    lua("erase", "a mail in a worker's hands is left", "if pending(KEYS[1], ARGV[1], sid) then", NEVER, "erase"),
    lua("erase", "an unfinished mail is left", "if live and ARGV[2] ~= '1' then", NEVER, "erase"),
    lua("erase", "its id counts as processed", "redis.call('SADD', KEYS[11], ARGV[5])", "", "erase"),
    lua("erase", "its raw mail is listed", "redis.call('SADD', KEYS[9], ref)", "", "erase"),
    lua("erase", "the stream is listed", "if gone[3] > 0 then", NEVER, "erase"),
    lua("erase", "the counter of its day", "redis.call('HINCRBY', KEYS[7], ARGV[6], -1) <= 0", "false", "erase"),
    lua(
        "rewrite",
        "what was deleted meanwhile",
        "if redis.call('XLEN', KEYS[2]) ~= redis.call('XLEN', KEYS[1]) then",
        NEVER,
        "erase",
    ),
    lua("rewrite", "readers keep their place", "#redis.call('XINFO', 'GROUPS', KEYS[1]) > 0", "false", "erase"),
    lua("reprocess", "what lives has no second life", "elseif location then", "elseif false then", "reprocess"),
    lua("reprocess", "FULL", "elseif redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then", "elseif false then", "reprocess"),
)


@dataclass(frozen=True)
class Outcome:
    """`noticed`: the test that failed first; "" none. `error`: what kept the mutant from being tried."""

    guard: Guard
    seconds: float
    noticed: str = ""
    covered: str = ""
    error: str = ""

    def __str__(self) -> str:
        seen = (self.error and f"ERROR {self.error}") or self.noticed or self.covered or "UNNOTICED"
        return f"{self.guard.name:<48} {self.seconds:4.0f} s  {seen}"


def copy_tree(folder: Path) -> Path:
    """What git knows or could know of the tree, as it stands, with the same .venv."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    return folder


def pytest(tree: Path, tests: Sequence[str], selected: str = "") -> tuple[int, str]:
    """(exit code, output). Nothing compiled is kept: a file changed twice in a second would be taken for unchanged."""
    wanted = f"({selected}) and {NOT}" if selected else NOT
    argv = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--tb=short", "--show-capture=no", "-k", wanted, *tests]
    try:
        done = subprocess.run(argv, cwd=tree, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 1, f"FAILED {tests[0]} - no end after {SECONDS:g} s"
    return done.returncode, done.stdout + done.stderr


def mutated(tree: Path, guards: Sequence[Guard], tests: Sequence[str], selected: str = "") -> tuple[int, str]:
    """The tests with these guards taken out; the tree is as before afterwards."""
    before = {guard.file: (tree / guard.file).read_text() for guard in guards}
    try:
        for guard in guards:
            text = (tree / guard.file).read_text()
            (tree / guard.file).write_text(text.replace(guard.text, guard.instead))
        return pytest(tree, tests, selected)
    finally:
        for name, text in before.items():
            (tree / name).write_text(text)


def try_out(tree: Path, guard: Guard) -> Outcome:
    began = time.monotonic()

    def outcome(**what: str) -> Outcome:
        return Outcome(guard, time.monotonic() - began, **what)

    times = (tree / guard.file).read_text().count(guard.text)
    if times != 1:
        return outcome(error=f"{guard.text!r} stands {times} times in {guard.file}")
    others = [other for other in GUARDS if other.name == guard.covered]
    for guards, tests, selected in (
        ([guard], guard.tests, guard.selected),
        ([guard], WIDER, ""),
        *([([guard, *others], (*others[0].tests, *WIDER), "")] if others else []),
    ):
        code, output = mutated(tree, guards, tests, selected)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        if "ompiling script" in output:
            return outcome(error="the mutant is no Lua")
        if code == 1 and failed:
            seen = failed[1].removeprefix("tests/")
            return outcome(noticed=seen) if len(guards) == 1 else outcome(covered=f"with '{guard.covered}' out too: {seen}")
        if code != 0:
            return outcome(error=f"pytest ends with {code}: {output[-300:]}")
    return outcome()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", default="", help="guards whose name holds this, e.g. 'complete: owner'")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at once; default: 2")
    given = parser.parse_args()
    chosen = [guard for guard in GUARDS if given.only in guard.name]
    if not chosen:
        parser.error(f"no guard's name holds {given.only!r}")
    outcomes: list[Outcome] = []
    waiting: queue.SimpleQueue[Guard] = queue.SimpleQueue()
    for guard in chosen:
        waiting.put(guard)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(Path(folder) / str(number)) for number in range(min(given.jobs, len(chosen)))]
        whole = sorted({(test, guard.selected) for guard in chosen for test in guard.tests})
        for test, selected in whole:
            code, output = pytest(trees[0], [test], selected)
            if code:
                print(f"without any mutant {test} fails already:\n{output[-2000:]}")
                return 1

        def work(tree: Path) -> None:
            while True:
                try:
                    guard = waiting.get_nowait()
                except queue.Empty:
                    return
                outcome = try_out(tree, guard)
                outcomes.append(outcome)
                print(outcome, flush=True)

        threads = [threading.Thread(target=work, args=(tree,)) for tree in trees]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    noticed = sum(1 for outcome in outcomes if outcome.noticed)
    covered = sum(1 for outcome in outcomes if outcome.covered)
    print(f"{len(outcomes)} guards: {noticed} noticed, {covered} covered by a pair, {len(outcomes) - noticed - covered} not")
    return 0 if noticed + covered == len(outcomes) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
