#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/pause.sh [MAILBOX…] [--workers] [--reason TEXT] [--help]

Holds mailboxes or all workers up until resume.sh, for every daemon on every machine, over restarts. No mail is lost meanwhile: it waits in
its mailbox, or in the stream. What is in flight is finished. Without anything to pause: shows what is paused.

  MAILBOX         ann@example.com (all its folders), ann@example.com/INBOX, or INBOX (of every account)
  --workers       all workers
  --reason TEXT   shown wherever the pause is
  --help          this text

Exit code 0: it is so, also if it was before. 1: Redis does not answer. 2: a wrong argument or setting."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
