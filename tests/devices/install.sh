#!/usr/bin/env bash
# Puts Triton into a folder beside a virtual environment's packages, for its interpreter: tests/devices.
#
#   tests/devices/install.sh VENV
#
# Idempotent. Into VENV/triton and not among the packages: an engine for the CPU that finds Triton asks it for a GPU.
# About 650 MB of disk, and some seconds.
set -euo pipefail

VERSION=3.6.0

venv=${1:?usage: install.sh VENV}
venv=$(cd "$venv" 2>/dev/null && pwd) || { echo "triton: FAILED: there is no folder $1" >&2; exit 1; }
target=$venv/triton
if [ "$(cat "$target/.complete" 2>/dev/null)" = "$VERSION" ]; then
    exit 0
fi
log=$(mktemp "${TMPDIR:-/tmp}/triton-install.XXXXXX")
rm -rf "$target"
if ! "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off --no-deps \
    --no-compile --target "$target" "triton==$VERSION" >"$log" 2>&1; then
    echo "triton: FAILED: pip install --target $target triton==$VERSION; the last lines of $log:" >&2
    tail -n 20 "$log" | sed 's/^/  | /' >&2
    exit 1
fi
rm -f "$log"
printf '%s\n' "$VERSION" >"$target/.complete"
echo "triton: $VERSION is installed"
