"""Pictures of the dashboard's panels, drawn from a run: `python -m tests.load.panels` writes them to docs/dashboard/.

Two minutes of the real daemons (a sandbox Gmail, Valkey, a producer, two workers) in trouble, with a Prometheus that watches them by
config/prometheus.yml. Then each expression of config/grafana_dashboard.json is asked for these two minutes, as Grafana asks. One SVG a row.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import pstdev

from tests.load.plot import Line, Panel, draw
from tests.support.busy import Busy
from tests.support.daemons import ROOT
from tests.support.prometheus import Prometheus, Query, queries

FOLDER = ROOT / "docs" / "dashboard"
SECONDS = 120
EACH_SECOND = 25
COLOURS = ("#2e7d32", "#1565c0", "#ef6c00", "#6a1b9a")
SCALES = {
    "s": (1000.0, "ms"),
    "percentunit": (100.0, "%"),
    "bytes": (1e-6, "MB"),
    "Bps": (1e-3, "kB/s"),
    "suffix: /s": (1.0, "/s"),
}
MOST_SERIES = 4  # as many names stand beside a panel's title
SLOWER = {
    "Since the mail server answered": (1.0, "s"),
    "Oldest unfinished mail": (1.0, "s"),
    "From the stream to done": (1.0, "s"),
    "Access token runs out in": (1 / 60, "minutes"),
    "Age of the consent": (1 / 86_400, "days"),
}


def trouble(busy: Busy) -> Sequence[tuple[int, str, Callable[[], object]]]:
    """(second, what is written beside it, what is done)."""
    return (
        (15, "the CRM is down", lambda: busy.crm(down=True)),
        (35, "the CRM is back", lambda: busy.crm(down=False)),
        (45, "a worker is killed (-9)", busy.workers[0].kill9),
        (55, "another takes its place", lambda: busy.workers.append(busy.start_worker())),
        (62, "IMAP sessions are cut", lambda: busy.sandbox.faults.bye(times=3)),
        (66, "Redis is nearly full", lambda: limit_memory(busy, 1.1)),
        (74, "maxmemory is raised", lambda: limit_memory(busy, 20)),
        (80, "Redis stands still", busy.redis.freeze),
        (90, "Redis goes on", busy.redis.thaw),
        (102, "400 mails at once", lambda: busy.pipeline.deliver(*["slow 150"] * 400)),
    )


def limit_memory(busy: Busy, times: float) -> None:
    """Redis may hold so many times what it holds."""
    client = busy.pipeline.client
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] * times))


def subjects(rand: random.Random) -> list[str]:
    """The mail of one second: mostly well, some slow, some that fail once, a few for the dead letters."""
    orders = ["ordinary", "slow 20", "slow 80", "crm", "fail 1", "permanent"]
    return rand.choices(orders, [40, 30, 15, 10, 4, 1], k=EACH_SECOND)


def run(busy: Busy) -> tuple[float, list[tuple[float, str]]]:
    """Let it happen; (unix time of the first mail, marks)."""
    rand, waiting, marks = random.Random(7), list(trouble(busy)), []
    busy.pipeline.wait_for_first_poll()
    began, tick = time.time(), threading.Event()
    for second in range(SECONDS):
        while waiting and waiting[0][0] <= second:
            at, what, do = waiting.pop(0)
            do()
            marks.append((float(at), what))
            print(f"{second:4} s  {what}", flush=True)
        busy.pipeline.deliver(*subjects(rand))
        tick.wait(max(0.0, began + second + 1 - time.time()))
    return began, marks


def panel(prometheus: Prometheus, title: str, asked: Sequence[Query], began: float) -> Panel | None:
    """None where all lines stayed at 0. Of many lines those are drawn that move most."""
    scale, unit = SLOWER.get(title) or SCALES.get(asked[0].unit, (1.0, ""))
    found: list[tuple[str, list[tuple[float, float]]]] = []
    for query in asked:
        for labels, points in prometheus.query_range(query.sent(), began, began + SECONDS):
            drawn = [(at - began, value * scale) for at, value in points if not math.isnan(value)]
            if drawn:
                found.append((query.name(labels).replace("127.0.0.1:", ":"), drawn))
    if not any(value for _, drawn in found for _, value in drawn):
        return None
    if len(found) > MOST_SERIES:
        found.sort(key=lambda line: pstdev(value for _, value in line[1]), reverse=True)
    lines = [Line(name, colour, drawn) for (name, drawn), colour in zip(found[:MOST_SERIES], COLOURS, strict=False)]
    return Panel(title, unit, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where the SVGs go (default: docs/dashboard)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, list[Query]]] = {}
    for query in queries():
        if query.kind == "timeseries":
            rows.setdefault(query.row, {}).setdefault(query.panel, []).append(query)
    with Busy(dead_letters_max=60) as busy:
        began, marks = run(busy)
        for row, panels in rows.items():
            made = {title: panel(busy.prometheus, title, asked, began) for title, asked in panels.items()}
            drawn = [one for one in made.values() if one is not None]
            path = out / f"{row.lower()}.svg"
            quiet = "".join(f", all 0: {title}" for title, one in made.items() if one is None)
            subtitle = "as config/grafana_dashboard.json asks for it, from a run of python -m tests.load.panels"
            path.write_text(draw(row, subtitle, drawn, marks), encoding="utf-8")
            print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: {path.stat().st_size / 1000:.0f} kB{quiet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
