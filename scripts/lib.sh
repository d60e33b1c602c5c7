# shellcheck shell=bash
# Set-up shared by the scripts; sourced with the repository's root as working directory. Runs on bash 3.2 (macOS) too.

POLICY=/usr/sbin/policy-rc.d
POLICY_ASIDE=$POLICY.before-email-twins
POLICY_MARK="# email-ingestion-twins: nothing that is being installed is started"

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { say "$*" >&2; exit 1; }

# setup_python runtime|dev: make .venv and install exactly what the requirements pin; nothing to do is noticed at once.
setup_python() {
  local kind=$1 files=(requirements.txt) python
  [ "$kind" = runtime ] || files+=(requirements-handlers.txt requirements-dev.txt)
  if .venv/bin/python -c '' 2>/dev/null; then
    [ "$(fingerprint "${files[@]}")" != "$(cat ".venv/.installed-$kind" 2>/dev/null)" ] || return 0
  else
    python=$(find_python) || die "no Python 3.11 or later found (tried python3, python3.11 to python3.14): install one, then run this again"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
      install_debian "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" ||
        die "$python cannot make virtual environments: install its venv package, then run this again"
    fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || die "$python -m venv .venv failed"
  fi
  say "installing the pinned packages into .venv (a minute or two)"
  install_requirements "${files[@]}" || die "the packages could not be installed: see above"
  fingerprint requirements.txt >.venv/.installed-runtime
  [ "$kind" = runtime ] || fingerprint "${files[@]}" >.venv/.installed-dev
}

# What .venv was made from; when it changes the packages are installed again.
fingerprint() {
  .venv/bin/python --version
  cat "$@"
}

# control usage argument…: scripts/control.py does what the script is called after; --help is answered before anything is set up.
control() {
  local usage=$1 argument
  shift
  for argument in "$@"; do
    case $argument in
      --) break ;;
      -h | --help) echo "$usage"; exit 0 ;;
    esac
  done
  argument=${0##*/}
  case $argument in # what only looks or stops installs nothing under daemons that run
    start.sh | scale.sh) setup_python runtime ;;
    *) [ -e .venv/.installed-runtime ] || .venv/bin/python -c 'import config.settings' 2>/dev/null || setup_python runtime ;;
  esac
  exec .venv/bin/python scripts/control.py "${argument%.sh}" "$@"
}

# The first interpreter that is new enough.
find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return 0
    fi
  done
  return 1
}

# The requirements list every package, also those that others pull in: --no-deps installs these versions and no more.
install_requirements() (
  set -o pipefail
  arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  .venv/bin/python -m pip install --disable-pip-version-check --no-input --no-deps --progress-bar off "${arguments[@]}" 2>&1 |
    { grep --line-buffered -vE '^( |Installing|Successfully)|already satisfied' || true; } || exit 1
  .venv/bin/python -m pip check --disable-pip-version-check
)

# setup_debian package:binary…: install the packages whose binary is missing. Where that cannot be done the tests skip.
setup_debian() {
  local pair missing=()
  for pair in "$@"; do
    PATH=$PATH:/usr/sbin:/sbin:$(echo /usr/lib/postgresql/*/bin) command -v "${pair#*:}" >/dev/null || missing+=("${pair%%:*}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  install_debian "${missing[@]}" || say "tests that need ${missing[*]} are skipped"
}

# install_debian package…: with apt-get, as root or through sudo without a password. No service is started.
install_debian() {
  local as_root=()
  if ! command -v apt-get >/dev/null; then
    say "no apt-get here (macOS or another system): $* cannot be installed by this script"
    return 1
  fi
  if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      say "neither root nor sudo without a password: $* cannot be installed"
      return 1
    fi
    as_root=(sudo -n)
  fi
  say "installing $* with apt-get (no service is started)"
  (
    as_root() { "${as_root[@]:-env}" "$@"; }
    trap 'policy_restore' EXIT
    policy_deny || exit 1
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=60 -qq)
    install=("${apt[@]}" install -y --no-install-recommends "$@")
    as_root "${install[@]}" >/dev/null 2>&1 && exit 0
    as_root "${apt[@]}" update && as_root "${install[@]}" >/dev/null
  )
}

# Debian starts a service when it is installed, unless policy-rc.d says 101. What stood there is moved aside as it is.
policy_deny() {
  policy_restore  # what an earlier run that was killed left behind
  if [ -e "$POLICY" ] || [ -L "$POLICY" ]; then as_root mv -T "$POLICY" "$POLICY_ASIDE" || return 1; fi
  printf '#!/bin/sh\n%s\nexit 101\n' "$POLICY_MARK" | as_root tee "$POLICY" >/dev/null && as_root chmod 755 "$POLICY"
}

policy_restore() {
  if grep -qsF "$POLICY_MARK" "$POLICY"; then as_root rm -f "$POLICY"; fi
  if [ -e "$POLICY_ASIDE" ] || [ -L "$POLICY_ASIDE" ]; then as_root mv -T "$POLICY_ASIDE" "$POLICY"; fi
}
