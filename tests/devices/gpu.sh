#!/usr/bin/env bash
# The tests and figures of CUDA copies, on a machine with a GPU. Works without .venv, without just, and without a
# package index: with whatever Python has torch, and with what offline.sh has put into .offline.
#
#   tests/devices/gpu.sh test [pytest's arguments]     fails where there is no GPU
#   tests/devices/gpu.sh bench                         likewise
#
# PYTHON=/path/to/python3 picks the interpreter; otherwise .venv's is taken, or else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
what=${1:?usage: gpu.sh test|bench}
shift

python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || { echo "gpu: no .venv here, and no python3" >&2; exit 1; }

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ! "$python" -c 'import kvplug.store' >/dev/null 2>&1 && compgen -G ".offline/*.whl" >/dev/null; then
    own=$(mktemp -d "${TMPDIR:-/tmp}/kvplug-gpu.XXXXXX")
    trap 'rm -rf "$own"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$own" .offline/*.whl
    PYTHONPATH=$PYTHONPATH:$own
fi
"$python" -c 'import kvplug.store' ||
    { echo "gpu: what kvplug needs is missing from $python: tests/devices/offline.sh brings it along" >&2; exit 1; }

case $what in
test) KVPLUG_TEST_GPU=1 "$python" -m pytest -p no:cacheprovider tests/devices/test_cuda.py "$@" ;;
bench) "$python" -m bench.gpu ;;
*) echo "usage: gpu.sh test|bench" >&2; exit 1 ;;
esac
