#!/usr/bin/env bash
# Makes what the RDMA lab boots: an emulated machine whose kernel has Soft-RoCE, so that real verbs run without a NIC.
#
#   tests/rdma_lab/install.sh VENV
#
# Idempotent: each step looks first and does nothing when it is done already. Everything lies in VENV/rdma_lab (about
# 600 MB): Debian's kernel and its libraries for verbs, downloaded and unpacked but not installed; both Python bindings;
# the initramfs; and kvplug's kernels, compiled here for the emulated processor, which would take minutes to do it.
# Only QEMU is installed on this machine, if it is not there: that alone needs root. Debian 12 or later on x86-64.
set -euo pipefail

PACKAGES=(busybox-static ibverbs-providers ibverbs-utils libibverbs1 libibumad3 libpci3 librdmacm1 libnl-3-200
          libnl-route-3-200 rdma-core rdmacm-utils python3-pyverbs)
# Whatever the processor here is, the guest's is another: both are told to use what every x86-64 has.
CPU=(NUMBA_CPU_NAME=x86-64 NUMBA_CPU_FEATURES=)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd -P)
venv=${1:?usage: install.sh VENV}
venv=$(cd "$venv" 2>/dev/null && pwd) || { echo "rdma lab: FAILED: there is no folder $1" >&2; exit 1; }
py=$venv/bin/python
lab=$venv/rdma_lab
log=$(mktemp "${TMPDIR:-/tmp}/rdma-lab-install.XXXXXX")
started=$SECONDS

say() { printf 'rdma lab: %s (%ds)\n' "$*" $((SECONDS - started)); }
stop() { echo "rdma lab: FAILED: $*" >&2; rm -f "$log"; exit 1; }
die() {
    printf 'rdma lab: FAILED: %s\n' "$*" >&2
    printf '  the last lines of the log (%s):\n' "$log" >&2
    tail -n 20 "$log" | sed 's/^/  | /' >&2
    exit 1
}
apt() { apt-get -q -o DPkg::Lock::Timeout=120 "$@" >>"$log" 2>&1; }
updated=
update_once() {
    [ -n "$updated" ] || [ "$(id -u)" != 0 ] || apt update || die "apt-get update: no package index can be reached"
    updated=1
}

[ -x "$py" ] || stop "$py is not there; make the environment first: ./justw install"
[ "$(uname -m)" = x86_64 ] || stop "this machine is $(uname -m): the lab's guest is an x86-64 one"
command -v apt-get >/dev/null || stop "there is no apt-get: the lab takes its kernel and libraries from Debian's packages"

if ! command -v qemu-system-x86_64 >/dev/null; then
    [ "$(id -u)" = 0 ] || stop "QEMU is not there, and installing it needs root: apt-get install qemu-system-x86"
    say "QEMU: about 100 MB"
    update_once
    apt install -y --no-install-recommends qemu-system-x86 || die "apt-get could not install qemu-system-x86"
fi
command -v setpriv >/dev/null || stop "setpriv is not there; install the system package util-linux"

# ---- the guest's kernel and libraries -------------------------------------------------------------------------------
stamp="$(sed -n '/^PACKAGES=/,/)$/p' "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$lab/debs/.complete" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$lab/debs" "$lab/kernel" "$lab/root" "$lab/guest.cpio.gz"
    mkdir -p "$lab/debs" "$lab/kernel" "$lab/root"
    cd "$lab/debs"
    kernel() { apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends:/ {print $2; exit}'; }
    [ -n "$(kernel)" ] || update_once
    [ -n "$(kernel)" ] || stop "apt knows no linux-image-amd64: the lab needs the package lists of Debian (apt-get update)"
    say "the guest's kernel and libraries: about 80 MB"
    # Lists that have grown old name packages that are no longer there.
    apt download "$(kernel)" "${PACKAGES[@]}" || { updated=; update_once; apt download "$(kernel)" "${PACKAGES[@]}"; } ||
        die "apt-get could not download the guest's packages"
    for deb in *.deb; do
        case $deb in linux-image-*) to=$lab/kernel ;; *) to=$lab/root ;; esac
        dpkg -x "$deb" "$to" >>"$log" 2>&1 || die "dpkg could not unpack $deb"
    done
    rm -f ./*.deb
    # The tree is laid over this machine's: a real /lib in it would hide the link that leads to /usr/lib.
    for d in lib bin sbin; do
        if [ -d "$lab/root/$d" ] && [ ! -L "$lab/root/$d" ]; then
            mkdir -p "$lab/root/usr/$d"
            cp -a "$lab/root/$d/." "$lab/root/usr/$d/"
            rm -r "${lab:?}/root/$d"
        fi
    done
    printf '%s\n' "$stamp" >.complete
    cd "$root"
fi

# ---- the bindings ---------------------------------------------------------------------------------------------------
if [ ! -e "$lab/python/.complete" ]; then
    rm -rf "$lab/python"
    mkdir -p "$lab/python"
    say "the bindings: ibverbs from the package index, pyverbs from Debian"
    "$py" -m pip --disable-pip-version-check --no-input install --progress-bar off --no-deps --target "$lab/python" \
        ibverbs >>"$log" 2>&1 || die "pip could not install ibverbs"
    ln -s "$lab/root/usr/lib/python3/dist-packages/pyverbs" "$lab/python/pyverbs"
    touch "$lab/python/.complete"
fi
libraries=$(dirname "$(find "$lab/root/usr/lib" -name 'libibverbs.so.1' | head -n 1)")
for binding in ibverbs pyverbs.device; do
    LD_LIBRARY_PATH=$libraries PYTHONPATH=$lab/python "$py" -c "import $binding" >>"$log" 2>&1 ||
        die "$binding does not load in $("$py" -V): Debian's pyverbs is built for Debian's own Python;" \
            "make .venv with that one (rm -r .venv; PYTHON=/usr/bin/python3 ./justw install)"
done

# ---- the initramfs --------------------------------------------------------------------------------------------------
image=$lab/guest.cpio.gz
stamp=$(cat "$here/initramfs.py" "$here/init.sh" "$lab/debs/.complete" | sha256sum | cut -d' ' -f1)
if [ ! -e "$image" ] || [ "$(cat "$image.stamp" 2>/dev/null)" != "$stamp" ]; then
    "$py" "$here/initramfs.py" "$lab/kernel" "$lab/root/usr/bin/busybox" "$here/init.sh" "$image" >>"$log" 2>&1 ||
        die "the initramfs could not be made"
    printf '%s\n' "$stamp" >"$image.stamp"
    say "the initramfs is made"
fi

# ---- kvplug's kernels -----------------------------------------------------------------------------------------------
mkdir -p "$lab/numba"
say "kvplug's kernels for the emulated processor (a quarter of a minute when shm/ has changed)"
env "${CPU[@]}" NUMBA_CACHE_DIR="$lab/numba" "$py" -c '
import kvplug.store
from kvplug.shm import integrity, jit
jit.warm_up()
integrity.prepare()' >>"$log" 2>&1 || die "kvplug's kernels could not be compiled"
printf 'export %s\n' "${CPU[@]}" NUMBA_CACHE_DIR="$lab/numba" PYTHONPATH="$lab/python" PATH="$venv/bin:\$PATH" >"$lab/env.sh"
say "ready"
rm -f "$log"
