#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/stop.sh [NAME…] [--kill] [--timeout S] [--help]

Stops what start.sh started, by SIGTERM: handlers finish, the rest of the mail is handed back. It says what it waits for.

  NAME          producer, worker (all of them) or worker-2 (default: everything)
  --kill        what still runs after that time gets SIGKILL; its mail is taken over after LEASE_SECONDS
  --timeout S   seconds to wait (default: until a daemon ends itself, 2 x SHUTDOWN_TIMEOUT + 4 x REDIS_SOCKET_TIMEOUT + 5)
  --help        this text

Exit code 0: nothing of it runs any more. 1: something still does."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
