"""The worker: carries every mail from the stream through a handler. `python worker.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from config.routes import load_routes
from config.settings import Settings, SettingsError, load_settings, misspelt_in
from src.common import logging_config
from src.common.clock import SYSTEM
from src.common.exceptions import ConfigurationError, Transient
from src.common.shutdown import Shutdown, leave

log = logging.getLogger("worker")

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
    parser.add_argument(
        "--handler", metavar="M:F", help="package.module:function or file.py:function (default: log a line, done)"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--dry-run", action="store_true", help="check everything and show what would be done; nothing is changed")
    other.add_argument("--drain", action="store_true", help="work until no mail is left, then end")
    other.add_argument("--try", dest="file", metavar="FILE", type=Path, help="run the handler on a message file, without Redis")
    return parser


def main() -> int:
    given = arguments().parse_args()
    flags = {variable: getattr(given, flag) for flag, variable in FLAGS.items()}
    os.umask(0o077)  # whatever is written here is about somebody's mail; handlers inherit it
    shutdown = Shutdown()
    try:
        settings = load_settings(flags)
        logging_config.configure(settings.run.log_format, settings.run.log_level)
        for name, meant in misspelt_in(Path(".env")).items():
            log.warning("%s in .env is no setting and does nothing: did you mean %s?", name, meant)
        return run(settings, given, shutdown)
    except (SettingsError, ConfigurationError) as error:
        print(f"worker.py: {error}", file=sys.stderr)  # noqa: T201  # the one line a wrong setting gets
        return 2
    except Transient as error:
        print(f"worker.py: {error}", file=sys.stderr)  # noqa: T201  # the same
        return shutdown.exit_code if shutdown.requested else 1


def run(settings: Settings, given: argparse.Namespace, shutdown: Shutdown) -> int:
    from src.worker.processor import load_handlers  # after the settings: --help and a wrong setting answer at once

    routes = load_routes(settings.work.handlers_file)
    if given.file or given.dry_run:
        from src.worker.trial import print_plan, print_trial

        handlers = load_handlers(settings.work, routes)
        if given.file:
            return print_trial(given.file, settings, handlers, SYSTEM, sys.stdout)
        return print_plan(settings, handlers, sys.stdout)

    from src.common.embedded import open_redis
    from src.worker.daemon import Worker

    shutdown.on_signals()
    handlers = load_handlers(settings.work, routes)
    with open_redis(settings, shutdown) as redis:
        Worker(settings, handlers, routes, redis, shutdown, SYSTEM, drain=given.drain).run()
    return leave(shutdown.exit_code)


if __name__ == "__main__":
    sys.exit(main())
