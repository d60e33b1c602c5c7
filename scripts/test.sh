#!/usr/bin/env bash
set -u
cd "$(dirname "$0")/.." || exit 1

usage="usage: ./scripts/test.sh [--all] [--help] [pytest arguments…]

Sets up what is missing (.venv with the pinned packages; on Debian redis-server, dovecot-imapd, postgresql, prometheus, chromium, shellcheck and
faketime, whose services are not started), runs scripts/check.sh, then the tests.

  --all    also the long runs (tests marked full), and at least 90 % of src covered by the others
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
  covered=() at_once=3 # most tests wait more than they work; not so where coverage is looked for
  [ ${#all[@]} -eq 0 ] || covered=(--cov=src --cov-report=term --cov-fail-under=90) at_once=2
  .venv/bin/python -m pytest -n $at_once --dist worksteal ${covered[@]+"${covered[@]}"} || failed+=(tests)
  if [ ${#all[@]} -gt 0 ]; then
    .venv/bin/python -m pytest --all -m full -n 3 --dist worksteal || failed+=("long tests")
  fi
fi

if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]} (${SECONDS} s)"
  exit 1
fi
say "passed in ${SECONDS} s"
