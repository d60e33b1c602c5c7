#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/start.sh [--workers N] [--no-producer] [--timeout S] [--help] [-- ARGUMENT…]

Starts producer.py and workers in the background, each in a session of its own, and waits until they are ready.
Pid files are in DATA_DIR/run, logs in DATA_DIR/logs. Settings come from the environment and .env.

  --workers N     how many workers (default: 2)
  --no-producer   workers only
  --timeout S     seconds to wait for ready (default: 60)
  -- ARGUMENT…    go to each worker, e.g. -- --handler my_handler:handle; with --workers 0 to the producer
  --help          this text

Exit code 0: all are ready (or paused by hand). 1: they run already, or one is not ready: it says which and why. 2: a wrong setting."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
