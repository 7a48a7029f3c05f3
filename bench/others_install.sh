#!/usr/bin/env bash
# Puts what a user would take instead of kvplug between hosts into an environment of its own, for the bench beside it.
#
#   bench/others_install.sh [VENV]       default: .venv/others
#
# Idempotent. About 300 MB, less than a minute. Nothing of kvplug needs it, and nothing of it is imported by kvplug.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${1:-$root/.venv/others}
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input --quiet \
    'redhare==0.6.0' 'mooncake-transfer-engine-non-cuda==0.3.13.post1' 'numpy>=1.26'
"$venv/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(redhare|mooncake)'
