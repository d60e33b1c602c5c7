#!/usr/bin/env bash
set -u
cd "$(dirname "$0")/.." || exit 1

usage="usage: ./scripts/test.sh [--all] [--help] [pytest arguments…]

Sets up what is missing (.venv with the pinned packages; on Debian redis-server, dovecot-imapd, postgresql, prometheus, chromium, shellcheck and
faketime, whose services are not started), runs scripts/check.sh, then the tests.

  --all    also the long runs (tests marked full), and at least 90 % of src covered by a part of the others
  --help   this text
  pytest arguments, e.g. tests/unit or -k dlq: only those tests, without checks and coverage

Exit code 0: everything passed. With CI=true a missing server fails the tests that need it; elsewhere they are skipped."

all=()
while [ $# -gt 0 ]; do
  case $1 in
    --all) all=(--all) ;;
    -h | --help) echo "$usage"; exit 0 ;;
    *) break ;;
  esac
  shift
done

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
SECONDS=0
setup_python dev
setup_debian redis-server:redis-server faketime:faketime dovecot-imapd:dovecot postgresql:initdb openssl:openssl \
  prometheus:promtool chromium:chromium shellcheck:shellcheck

failed=()
if [ $# -gt 0 ]; then
  .venv/bin/python -m pytest ${all[@]+"${all[@]}"} "$@" || failed+=(tests)
else
  ./scripts/check.sh || failed+=(checks)
  tests=(-m pytest --dist worksteal -n) # most tests wait more than they work: three at once on two cores
  if [ ${#all[@]} -eq 0 ]; then
    .venv/bin/python "${tests[@]}" 3 || failed+=(tests)
  else
    # What is covered is told by these, which tracing slows down by a half; the others would add 3 %.
    covered=(tests/unit tests/integration/test_{backup,commands,demo,doctor,end_to_end,handlers,scripts,webhook,worker_commands}.py)
    .venv/bin/python "${tests[@]}" 2 --cov=src --cov-report=term --cov-fail-under=90 "${covered[@]}" || failed+=("covered tests")
    .venv/bin/python "${tests[@]}" 3 --all "${covered[@]/#/--ignore=}" || failed+=("other tests")
    .venv/bin/python "${tests[@]}" 3 --all -m full "${covered[@]}" || failed+=("long tests")
  fi
fi

if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]} (${SECONDS} s)"
  exit 1
fi
say "passed in ${SECONDS} s"
