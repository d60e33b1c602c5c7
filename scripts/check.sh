#!/usr/bin/env bash
# Style, types and imports: every check runs, any complaint makes the exit code 1. Settings are in pyproject.toml.
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
setup_python dev

failed=()
check() {
  local name=$1
  shift
  say "$name"
  "$@" || failed+=("$name")
}

check "ruff check" .venv/bin/ruff check --quiet .
check "ruff format" .venv/bin/ruff format --quiet --check --output-format concise .
check "mypy --strict" .venv/bin/mypy --no-error-summary
check "lint-imports" .venv/bin/lint-imports --no-logo
if command -v shellcheck >/dev/null; then
  check "shellcheck" shellcheck -x scripts/*.sh .ci/run
fi

[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
