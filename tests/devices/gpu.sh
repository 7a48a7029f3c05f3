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

own=$(mktemp -d "${TMPDIR:-/tmp}/kvplug-gpu.XXXXXX")
trap 'rm -rf "$own"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ! "$python" -c 'import kvplug.shm.copy' >/dev/null 2>&1; then
    # Not installed: the packages under the names that they are installed with, as links, ahead of everything else.
    mkdir "$own/links" "$own/links/kvplug"
    for entry in kvplug/*; do
        case $entry in */__pycache__) ;; *) ln -s "$root/$entry" "$own/links/kvplug/" ;; esac
    done
    for beside in shm rdma adapters; do ln -s "$root/$beside" "$own/links/kvplug/$beside"; done
    PYTHONPATH=$own/links:$PYTHONPATH
    if compgen -G ".offline/*.whl" >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
            --target "$own/site" .offline/*.whl
        PYTHONPATH=$PYTHONPATH:$own/site
    fi
fi
"$python" -c 'import kvplug.shm.copy, kvplug.store' ||
    { echo "gpu: what kvplug needs is missing from $python: tests/devices/offline.sh brings it along" >&2; exit 1; }

case $what in
test) KVPLUG_TEST_GPU=1 "$python" -m pytest -p no:cacheprovider tests/devices/test_cuda.py "$@" ;;
bench) "$python" -m bench.gpu ;;
*) echo "usage: gpu.sh test|bench" >&2; exit 1 ;;
esac
