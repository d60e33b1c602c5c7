#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/resume.sh [MAILBOX…] [--workers] [--help]

Ends what pause.sh began, within two seconds. Without anything to resume: shows what is paused.

  MAILBOX     as it was paused: ann@example.com, ann@example.com/INBOX, or INBOX
  --workers   all workers
  --help      this text

Exit code 0: it is so, also if it was before. 1: Redis does not answer. 2: a wrong argument or setting."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
