#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/logs.sh [NAME…] [-f] [-n N] [--help]

The last lines of what the daemons of start.sh wrote (DATA_DIR/logs).

  NAME     producer, worker (all of them) or worker-2 (default: everything)
  -f       go on with what comes, until Ctrl-C
  -n N     how many lines (default: 50)
  --help   this text"

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
