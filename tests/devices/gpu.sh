#!/usr/bin/env bash
# The tests and figures of CUDA copies, on a machine with a GPU. Works without .venv, without just, and without a
# package index: with whatever Python has torch, and with what offline.sh has put into .offline.
#
#   tests/devices/gpu.sh test [pytest's arguments]     fails where there is no GPU
#   tests/devices/gpu.sh bench                         likewise
#   tests/devices/gpu.sh all [SECONDS]                 both, part by part, within so many seconds (560); for a machine
#                                                      that is there once: logs and figures go to $OUT, where it is set
#
# PYTHON=/path/to/python3 picks the interpreter; otherwise .venv's is taken, or else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
what=${1:?usage: gpu.sh test|bench|all}
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

suite=(-m pytest -p no:cacheprovider tests/devices/test_cuda.py)

# Everything, each part in a process of its own: an illegal address or a hang costs its own part and no other. What is
# short or says most comes first. -k takes "[copy" and the like from the ids of the tests: the way that is on trial.
everything() {
    local end=$((SECONDS + ${1:-560})) logs=${OUT:-$root/bench/results} rows=() failed=0
    mkdir -p "$logs"
    nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.current --format=csv,noheader || true
    "$python" -c 'import importlib.metadata as m, sys; print(sys.version.split()[0], *(f"{d.name} {d.version}"
        for name in ("torch", "triton", "numpy", "numba", "pytest") for d in m.distributions(name=name)))' || true

    part() { # NAME SECONDS ARGUMENTS OF PYTHON
        local name=$1 most=$2 left=$((end - SECONDS)) began=$SECONDS status=0 said
        shift 2
        [ "$most" -le "$left" ] || most=$left
        if [ "$most" -lt 15 ]; then
            rows+=("$name: no time left")
            failed=1
            return
        fi
        printf '\n== %s\n' "$name"
        timeout -k 10 "$most" "$python" "$@" >"$logs/gpu-$name.log" 2>&1 || status=$?
        tail -n 40 "$logs/gpu-$name.log" | cut -c 1-300
        said=$(grep -v '^ *$' "$logs/gpu-$name.log" | tail -n 1 | cut -c 1-150) || true
        rows+=("$name: exit $status after $((SECONDS - began)) s: $said")
        [ "$status" = 0 ] || failed=1
    }
    tests() { # NAME SECONDS EXPRESSION
        part "$1" "$2" "${suite[@]}" -q --tb=short --maxfail=8 -o "faulthandler_timeout=$(($2 - 20))" -k "$3"
    }
    export KVPLUG_TEST_GPU=1
    tests start 120 "not ([copy or [kernel or [both or [ring)"
    tests copy-engines 100 "[copy"
    tests kernel 140 "[kernel"
    part bench 150 -m bench.gpu
    tests ring 80 "[ring"
    tests both 80 "[both"
    [ -z "${OUT:-}" ] || cp bench/results/gpu.json "$OUT" || true
    printf '\n'
    printf '%s\n' "${rows[@]}"
    return "$failed"
}

case $what in
test) KVPLUG_TEST_GPU=1 "$python" "${suite[@]}" "$@" ;;
bench) "$python" -m bench.gpu ;;
all) everything "$@" ;;
*) echo "usage: gpu.sh test|bench|all" >&2; exit 1 ;;
esac
