"""The worker: carries every mail from the stream through a handler. `python worker.py --help`."""

from __future__ import annotations

import argparse
import sys

from config.settings import SettingsError, load_settings
from src.common import logging_config
from src.common.clock import SYSTEM
from src.common.embedded import open_redis
from src.common.exceptions import ConfigurationError, Transient
from src.common.shutdown import Shutdown

FLAGS = {
    "stream": "STREAM_NAME",
    "group": "CONSUMER_GROUP",
    "consumer": "CONSUMER_NAME",
    "batch_size": "WORKER_BATCH_SIZE",
    "block_timeout": "WORKER_BLOCK_MS",
    "concurrency": "WORKER_CONCURRENCY",
    "handler": "WORKER_HANDLER",
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Carries every mail from the stream through a handler, until it is stopped.")
    parser.add_argument("--stream", metavar="S", help="stream to read (default: email_ingestion_stream)")
    parser.add_argument("--group", metavar="G", help="consumer group (default: email_workers)")
    parser.add_argument("--consumer", metavar="C", help="label of this worker; its name in Redis is C-<pid>-<nonce>")
    parser.add_argument("--batch-size", metavar="N", help="most mails in one read (default: 100)")
    parser.add_argument("--block-timeout", metavar="MS", help="milliseconds a read waits for mail (default: 2000)")
    parser.add_argument("--concurrency", metavar="N", help="handlers at work at once (default: 8)")
    parser.add_argument("--handler", metavar="M:F", help="package.module:function (default: log a line, done)")
    return parser


def main() -> int:
    given = vars(arguments().parse_args())
    shutdown = Shutdown()
    try:
        settings = load_settings({FLAGS[flag]: value for flag, value in given.items()})
        logging_config.configure(settings.run.log_format, settings.run.log_level)
        shutdown.on_signals()
        from src.worker.daemon import Worker  # after the settings: --help and a wrong setting answer at once
        from src.worker.processor import load_handler

        handler = load_handler(settings.work.handler)
        with open_redis(settings, shutdown) as redis:
            Worker(settings, handler, redis, shutdown, SYSTEM).run()
    except (SettingsError, ConfigurationError) as error:
        print(f"worker.py: {error}", file=sys.stderr)  # noqa: T201  # the one line a wrong setting gets
        return 2
    except Transient as error:
        print(f"worker.py: {error}", file=sys.stderr)  # noqa: T201
        return shutdown.exit_code if shutdown.requested else 1
    return shutdown.exit_code


if __name__ == "__main__":
    sys.exit(main())
