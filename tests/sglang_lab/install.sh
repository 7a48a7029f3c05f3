#!/usr/bin/env bash
# Puts real SGLang into a virtual environment that has vLLM's lab in it already: the servers that tests/sglang run.
#
#   tests/sglang_lab/install.sh VENV
#
# Idempotent: each step looks first and does nothing when it is done already. Each release lies in a folder of its own,
# VENV/sglang/<version>, without its dependencies: it runs on those of vLLM's lab (torch, transformers, ...) through
# PYTHONPATH, on the little that is missing there (VENV/sglang/deps), and on the stand-ins of tests/sglang_lab/site for
# what only an accelerator can use. About 500 MB of disk, and two or three minutes. Needs a package index, g++ and OpenSSL's
# headers: SGLang compiles its page hash at first use, which is done here.
set -euo pipefail

DEPS=('orjson>=3.10')

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:?usage: install.sh VENV [--no-matrix]}
venv=$(cd "$venv" 2>/dev/null && pwd) || { echo "sglang lab: FAILED: there is no folder $1" >&2; exit 1; }
py=$venv/bin/python
log=$(mktemp "${TMPDIR:-/tmp}/sglang-lab-install.XXXXXX")
started=$SECONDS

say() { printf 'sglang lab: %s (%ds)\n' "$*" $((SECONDS - started)); }
stop() { echo "sglang lab: FAILED: $*" >&2; exit 1; }
die() {
    printf 'sglang lab: FAILED: %s\n' "$*" >&2
    printf '  the last lines of the log (%s):\n' "$log" >&2
    tail -n 20 "$log" | sed 's/^/  | /' >&2
    exit 1
}
# Not compiled to bytecode: Python does that for the third that is ever imported.
pip_into() {
    local target=$1
    shift
    "$py" -m pip --disable-pip-version-check --no-input install --progress-bar off --no-compile --no-deps \
        --target "$target" "$@" >>"$log" 2>&1
}

[ -x "$py" ] || stop "$py is not there; make the environment first: python3 -m venv $venv"
"$py" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    stop "SGLang needs Python 3.11 to 3.13, this one is $("$py" -V)"
"$py" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' ||
    stop "SGLang runs on what vLLM's lab brings along: tests/vllm_lab/install.sh $venv comes first"
command -v g++ >/dev/null || stop "g++ is not there; install the system package g++"
echo '#include <openssl/evp.h>' | g++ -fsyntax-only -x c++ - 2>>"$log" ||
    stop "OpenSSL's headers are not there; install the system package libssl-dev (openssl-devel)"

mapfile -t VERSIONS < <("$py" -I "$here/../../kvplug/engines.py" sglang)
if [ "${2:-}" = --no-matrix ]; then VERSIONS=("${VERSIONS[0]}"); fi

deps=$venv/sglang/deps
if [ "$(cat "$deps/.complete" 2>/dev/null)" != "${DEPS[*]}" ]; then
    rm -rf "$deps"
    pip_into "$deps" "${DEPS[@]}" || die "pip install --target $deps ${DEPS[*]}"
    printf '%s\n' "${DEPS[*]}" >"$deps/.complete"
    say "installed what SGLang needs and vLLM does not: ${DEPS[*]}"
fi

for version in "${VERSIONS[@]}"; do
    target=$venv/sglang/$version
    if [ -f "$target/.complete" ]; then
        say "SGLang $version is installed"
        continue
    fi
    say "installing SGLang $version"
    rm -rf "$target"
    pip_into "$target" "sglang==$version" || die "pip install --target $target sglang==$version"
    # The page hash is compiled where servers of the lab look for it, and the server's modules are read once.
    PATH=$venv/bin:$PATH PYTHONPATH=$here/site:$target:$deps TORCH_EXTENSIONS_DIR=$target/.extensions \
        SGLANG_CACHE_DIR=$venv/sglang/cache SGLANG_USE_CPU_ENGINE=1 SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 \
        "$py" - >>"$log" 2>&1 <<'PY' || die "SGLang $version does not run"
import sglang.srt.entrypoints.http_server
from sglang.srt.mem_cache.utils import get_hash_str

hashes = get_hash_str(list(range(8)), None, 4)
assert len(hashes) == 2 and all(len(h) == 64 for h in hashes), hashes
PY
    touch "$target/.complete"
    say "installed SGLang $version"
done

rm -f "$log"
say "ready"
