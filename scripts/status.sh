#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/status.sh [--help]

What runs, here and on other machines; mailboxes, the stream in numbers, what is paused, what is wrong and what to do about it.

Exit code 0: all well. 1: something is wrong. 2: a wrong setting. 3: nothing runs."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
