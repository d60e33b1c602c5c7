"""`python -m tests.load.screenshot [--minutes 60]`: docs/status-page.png, the status page after so long a quiet day of real daemons.

A sandbox Gmail, a Valkey, a producer and two workers with the demo's handler, mail that comes now faster, now slower.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import threading
import time
from pathlib import Path

from src.sandbox.server import Sandbox
from tests.support.browser import Browser
from tests.support.daemons import ROOT
from tests.support.pipeline import Pipeline
from tests.support.servers import RedisServer
from tests.support.wait import until

EVERY = 5.0  # seconds between two arrivals
HANDLER = "src.sandbox.demo_handler:handle"


def mails_at(minute: float, draw: random.Random) -> int:
    """How many arrive now: waves of some minutes, and a burst now and then."""
    return round(draw.random() * (4 + 3 * math.sin(minute / 3)) + (25 if draw.random() < 0.01 else 0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.load.screenshot", description="Makes docs/status-page.png.")
    parser.add_argument("--minutes", type=float, default=60, help="how long mail flows first; default: 60")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "status-page.png", help="default: docs/status-page.png")
    given = parser.parse_args()
    draw, pause = random.Random(3), threading.Event()
    with tempfile.TemporaryDirectory() as folder, Sandbox() as sandbox, RedisServer("valkey") as redis:
        pipeline = Pipeline(
            sandbox, redis, Path(folder), WORKER_HANDLER=HANDLER, MAX_ATTEMPTS="3", BACKOFF_BASE="20", BACKOFF_CAP="60"
        )
        with pipeline.producer() as producer, pipeline.worker(), pipeline.worker(), Browser(1180, 1010) as browser:
            address = producer.wait_for(r"health: (http://127\.0\.0\.1:\d+)/health")[1]
            began = time.monotonic()
            while (seconds := time.monotonic() - began) < 60 * given.minutes:
                count = mails_at(seconds / 60, draw)
                if count:
                    sandbox.deliver_generated(pipeline.account, seed=draw.randrange(10**6), count=count)
                pause.wait(EVERY)
            browser.open(f"{address}/")
            until(lambda: "by error" in browser.text("#letters"), 30, "the dead letters are shown")
            browser.screenshot(given.out)
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
