#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/scale.sh N [--timeout S] [--help] [-- ARGUMENT…]

As many workers as N on this machine, 0 too. New ones get the arguments of the last one that runs, or of one that was killed; the newest
ones are stopped first, by SIGTERM: what is in flight is finished or handed back, nothing is lost.

  --timeout S     seconds to wait until new ones are ready (default: 60)
  -- ARGUMENT…    for new workers, e.g. -- --handler my_handler:handle
  --help          this text

Exit code 0: N workers run. 1: not so, it says why."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
