"""The initramfs of a lab guest: busybox, the kernel modules that the guest needs in the order they load, and init.

usage: initramfs.py KERNEL BUSYBOX INIT OUT.cpio.gz      (KERNEL: the unpacked package of a Debian kernel)
"""

from __future__ import annotations

import gzip
import lzma
import re
import stat
import subprocess
import sys
from pathlib import Path

BASE = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""What the guest needs to see this machine's files."""
RDMA = ("crc32_generic", "crc32c_generic", "virtio_net", "dummy", "ib_uverbs", "rdma_ucm", "rdma_rxe", "sch_netem")
"""And what the tests need."""
FOLDERS = ("bin", "dev", "proc", "sys", "mod", "lower", "extra", "rw", "new")


def unpacked(path: Path) -> bytes:
    """A module's bytes; distributions compress them, each its own way."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    return path.read_bytes()


def needs(module: bytes) -> list[str]:
    """Names of the modules that must be there first: from its .modinfo, NUL-separated key=value."""
    found: list[str] = []
    for pattern in (rb"\0softdep=pre: ([^\0]*?)(?: post:[^\0]*)?\0", rb"\0depends=([^\0]*)(?=\0)"):
        for match in re.finditer(pattern, module):
            found += re.split("[ ,]+", match.group(1).decode().replace("-", "_").strip())
    return [name for name in found if name]


def in_order(kernel: Path, wanted: tuple[str, ...], before: dict[str, bytes]) -> dict[str, bytes]:
    """These modules and all that they need, each after what it needs, without those of ``before``.

    Raises FileNotFoundError for a wanted module that this kernel has neither as a file nor built in.
    """
    files = {
        re.sub(r"\.ko.*", "", path.name).replace("-", "_"): path
        for path in sorted(kernel.rglob("*.ko*"))
        if path.is_file()
    }
    builtin = {
        Path(line).stem.replace("-", "_")
        for listing in kernel.rglob("modules.builtin")
        for line in listing.read_text().split()
    }
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in order or name in before or name in builtin:
            return
        if name not in files:
            if name in wanted:
                raise FileNotFoundError(f"{kernel} has no module {name}")
            return  # a soft dependency on what this kernel has otherwise
        module = unpacked(files[name])
        for other in needs(module):
            add(other)
        order[name] = module

    for name in wanted:
        add(name)
    return order


class Archive:
    """A cpio archive in the form that the kernel unpacks ("newc")."""

    def __init__(self) -> None:
        self._bytes, self._entries = bytearray(), 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """One entry. mode: with its type."""
        self._entries += 1
        encoded = name.encode() + b"\0"
        fields = (self._entries, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._pad(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad(data)

    def _pad(self, data: bytes) -> None:
        self._bytes += data + b"\0" * (-len(data) % 4)

    def finished(self) -> bytes:
        """All of it."""
        self.add("TRAILER!!!", 0)
        return bytes(self._bytes)


def build(kernel: Path, busybox: Path, init: Path) -> bytes:
    """The archive, not compressed."""
    archive = Archive()
    for folder in FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, init.read_bytes())
    before: dict[str, bytes] = {}
    for stage, wanted in (("base", BASE), ("rdma", RDMA)):
        modules = in_order(kernel, wanted, before)
        print(f"{stage}: {' '.join(modules)}")
        for name, data in modules.items():
            archive.add(f"mod/{name}.ko", stat.S_IFREG | 0o644, data)
        archive.add(f"mod/{stage}", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in modules).encode())
        before |= modules
    return archive.finished()


def main() -> None:
    """Write it."""
    kernel, busybox, init, out = map(Path, sys.argv[1:])
    out.write_bytes(gzip.compress(build(kernel, busybox, init), 1, mtime=0))


if __name__ == "__main__":
    main()
