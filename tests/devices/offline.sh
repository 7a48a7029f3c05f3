#!/usr/bin/env bash
# Puts what kvplug needs into .offline as wheels, for a machine with a GPU and no package index: gpu.sh finds it there.
# What has to be on that machine already: torch with CUDA, Triton, numpy, numba, xxhash, rich, pytest, pytest-timeout and
# hypothesis.
#
#   tests/devices/offline.sh [3.12]      the version of Python on that machine, which is x86-64
set -euo pipefail

version=${1:-3.12}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

# With what they need in turn: pydantic works with one version of pydantic-core alone, which is not always the newest.
packages=(blake3 msgspec posix_ipc pydantic)
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux_2_12 manylinux_2_5 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
rm -rf "$root/.offline"
"$python" -m pip --disable-pip-version-check download -q --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" -d "$root/.offline" "${packages[@]}"
du -sh "$root/.offline"
