#!/usr/bin/env bash
set -eu
cd "$(dirname "$0")/.."

usage="usage: ./scripts/health_check.sh [--help]

One line for cron, Nagios and their like: how the daemons are, here and on other machines.

Exit code 0: OK. 1: DEGRADED, mail flows or somebody paused it, and something is wrong. 2: DOWN: Redis is away, there is no producer or
no worker, none of them can work, or a daemon stands still."

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
control "$usage" "$@"
