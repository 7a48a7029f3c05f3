#!/usr/bin/env bash
# The wheel for aarch64, used by a Python of that machine in an emulator: the first blocks, and with arguments also tests.
#
#     bash tests/wheels/aarch64.sh [tests/pool/test_sdk.py ...]
#
# By hand, not in `./justw test`: it wants Debian and root once for qemu-user-static, and an emulated Python is some fifty
# times slower. What is not shown by it: the order in which such a processor's memory becomes visible to other cores.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
py=$root/.venv/bin/python
at=$(mktemp -d "${TMPDIR:-/tmp}/kvplug-aarch64.XXXXXX")
trap 'rm -rf "$at"' EXIT
version=3.11

# a compiler for the machine, a wheel, and what the wheel depends on
"$py" -m pip install -q --disable-pip-version-check --target "$at/zig" ziglang
(cd "$root" && PYTHONPATH=$root:$at/zig "$py" -m kvplug.shm.build --machine aarch64)
mkdir "$at/sources" "$at/site"
cp -r "$root"/{kvplug,shm,rdma,adapters,pyproject.toml,setup.py,README.md,LICENSE} "$at/sources/"
find "$at/sources" -name __pycache__ -prune -exec rm -rf {} +
KVPLUG_WHEEL=aarch64 "$py" -m pip wheel -q --no-deps --no-build-isolation -w "$at" "$at/sources"
mapfile -t needed < <("$py" - "$version" <<'PY'
import sys, tomllib
for one in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    name, _, marker = one.partition(";")
    if not name.startswith("numba") and not marker:
        print(name.strip())
PY
)
[ $# -eq 0 ] || needed+=(pytest pytest-timeout hypothesis psutil)
"$py" -m pip install -q --disable-pip-version-check --target "$at/site" --python-version "$version" --only-binary :all: \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 "${needed[@]}"
"$py" -m zipfile -e "$at"/kvplug-*_aarch64.whl "$at/site"

# Debian's Python for it, unpacked, not installed
command -v qemu-aarch64-static >/dev/null || apt-get install -y -q qemu-user-static >/dev/null
apt="-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists=$at/lists -o Dir::Cache=$at/cache"
mkdir -p "$at/lists/partial" "$at/cache/archives/partial" "$at/debs"
# shellcheck disable=SC2086  # options, word by word
(
    cd "$at/debs"
    apt-get $apt update -q >/dev/null
    apt-get $apt download -q python$version-minimal libpython$version-{minimal,stdlib} libc6 zlib1g libexpat1 libssl3 libffi8 \
        libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libgcc-s1 libstdc++6 libcrypt1 libnsl2 libtirpc3 >/dev/null
)
for deb in "$at"/debs/*.deb; do dpkg -x "$deb" "$at/root"; done

cat >"$at/first.py" <<'PY'
import platform, sys
import numpy as np
from kvplug import KvStore
from kvplug.shm import jit
from kvplug.shm.segment import remove_pool

rng = np.random.default_rng(1)
keys, blocks = rng.integers(0, 256, (500, 32), np.uint8), rng.integers(0, 256, (500, 4096), np.uint8)
with KvStore(sys.argv[1], "64mib") as store:
    assert not store.put(keys, blocks).any()
    out = np.zeros_like(blocks)
    assert not store.get_into(keys, out).any()
    assert (out == blocks).all()
    assert store.match_prefix(keys) == 500 == int(store.exists(keys).sum())
    store.check_integrity()
remove_pool(sys.argv[1])
assert platform.machine() == "aarch64" and "numba" not in sys.modules
print(f"aarch64: {jit.KERNELS.why}")
PY
run() {
    PYTHONPATH=$at/site PYTHONHOME=$at/root/usr qemu-aarch64-static -L "$at/root" "$at/root/usr/bin/python$version" "$@"
}
run "$at/first.py" "aarch64-$$"
if [ $# -gt 0 ]; then
    cp -r "$root/tests" "$root/pyproject.toml" "$at/sources/"
    rm -rf "$at"/sources/{kvplug,shm,rdma,adapters}
    cd "$at/sources"
    run -m pytest -q -p no:cacheprovider --timeout 3000 "$@"
fi
