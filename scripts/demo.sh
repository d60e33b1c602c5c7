#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/demo.sh [--emails N] [--keep] [--help]

The email twins at work, on this machine alone: a sandbox Gmail, a Valkey of the demo's own, producer.py and two worker.py.
Mail arrives, handlers fail, a worker is killed, the producer is restarted; then every mail is accounted for.

  --emails N   how many mails arrive (default: 500)
  --keep       leave it running at the end and say what to look at
  --help       this text

Exit code 0: every mail was done or is a dead letter, once. 1: not so (it says which), 130: interrupted."

for argument in "$@"; do
  case $argument in -h | --help) echo "$usage"; exit 0 ;; esac
done

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
setup_python runtime
exec .venv/bin/python -m src.sandbox.demo "$@"
