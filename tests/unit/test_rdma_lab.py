"""The RDMA lab is whole: what can be said of it without booting it. `just test-rdma` boots it."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import pytest

from tests.rdma_lab import guest, initramfs
from tests.rdma_lab.guest import Ended
from tests.rdma_lab.run import Tally

LAB = Path(__file__).resolve().parents[1] / "rdma_lab"


@pytest.mark.parametrize("script", sorted(path.name for path in LAB.glob("*.sh")))
def test_its_scripts_are_well_formed(script: str) -> None:
    shell = "sh" if script == "init.sh" else "bash"
    run = subprocess.run([shell, "-n", LAB / script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_install_says_what_is_missing(tmp_path: Path) -> None:
    for venv in (tmp_path / "nowhere", tmp_path):
        run = subprocess.run(["bash", LAB / "install.sh", venv], capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "rdma lab: FAILED: " in run.stderr
        assert str(venv) in run.stderr


def test_a_guest_without_a_lab_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "LAB", tmp_path)
    with guest.Guest(tmp_path / "out") as machine, pytest.raises(FileNotFoundError, match=r"install\.sh"):
        machine.start("true")


def kernel(folder: Path) -> Path:
    """As a distribution packs one: modules that say what they need, in folders, some of them compressed or built in."""
    modules = folder / "lib/modules/6.0/kernel"
    (modules / "net").mkdir(parents=True)

    def module(name: str, depends: str, soft: str = "") -> bytes:
        return f"\x7fELF\0name={name}\0depends={depends}\0{f'softdep=pre: {soft}' if soft else 'x'}\0".encode()

    wanted = (*initramfs.BASE, *initramfs.RDMA)
    for name in wanted:
        depends = {"9p": "9pnet,netfs", "rdma_rxe": "ib-core,udp_tunnel"}.get(name, "")
        (modules / "net" / f"{name}.ko").write_bytes(module(name, depends, "hash gone" if name == "rdma_rxe" else ""))
    (modules / "net" / "dummy.ko").unlink()
    (folder / "lib/modules/6.0/modules.builtin").write_text("kernel/net/dummy.ko\n")
    for name, depends in (("9pnet", ""), ("netfs", "9pnet"), ("ib-core", ""), ("udp_tunnel", "ib-core"), ("hash", "")):
        (modules / f"{name}.ko").write_bytes(module(name, depends))
    packed = modules / "netfs.ko"
    (modules / "netfs.ko.xz").write_bytes(lzma.compress(packed.read_bytes()))
    packed.unlink()
    return folder


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    tree = kernel(tmp_path)
    base = initramfs.in_order(tree, initramfs.BASE, {})
    assert list(base) == ["virtio_pci", "9pnet_virtio", "9pnet", "netfs", "9p", "overlay"]
    assert base["netfs"].startswith(b"\x7fELF")
    rdma = list(initramfs.in_order(tree, initramfs.RDMA, base))
    assert "dummy" not in rdma, "it is built in"
    assert rdma[rdma.index("ib_uverbs") :][-5:] == ["hash", "ib_core", "udp_tunnel", "rdma_rxe", "sch_netem"]


def test_a_kernel_without_a_module_is_refused(tmp_path: Path) -> None:
    tree = kernel(tmp_path)
    next(tree.rglob("rdma_rxe.ko")).unlink()
    with pytest.raises(FileNotFoundError, match="no module rdma_rxe"):
        initramfs.in_order(tree, initramfs.RDMA, {})


def test_the_archive_is_one_that_others_read(tmp_path: Path) -> None:
    (tmp_path / "busybox").write_bytes(b"the tools")
    archive = initramfs.build(kernel(tmp_path / "kernel"), tmp_path / "busybox", LAB / "init.sh")
    names, at = {}, 0
    while True:  # as the kernel reads it: header of 6 + 13 * 8 digits, name, data, each to a multiple of 4
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        at += -(-(110 + fields[11]) // 4) * 4
        names[name] = archive[at : at + fields[6]]
        at += -(-fields[6] // 4) * 4
        if name == "TRAILER!!!":
            break
    assert at == len(archive)
    assert names["init"] == (LAB / "init.sh").read_bytes()
    assert names["bin/busybox"] == b"the tools"
    for stage in ("base", "rdma"):
        for module in names[f"mod/{stage}"].decode().split():
            assert f"mod/{module}.ko" in names


def test_what_did_not_run_counts_as_failed(tmp_path: Path) -> None:
    """No report, an empty one, no end; a check that was skipped; a crash at the very end."""
    tally = Tally()
    tally.add("one", Ended(0, ""), tmp_path / "none.xml")
    (tmp_path / "empty.xml").write_text("<testsuites><testsuite/></testsuites>")
    tally.add("two", Ended(0, ""), tmp_path / "empty.xml")
    assert (tally.passed, len(tally.failed)) == (0, 2)
    (tmp_path / "some.xml").write_text(
        "<testsuites><testsuite><testcase classname='a' name='good'><system-out>x</system-out></testcase>"
        "<testcase classname='a' name='left'><skipped message='m'/></testcase>"
        "<testcase classname='a' name='bad'><failure message='m'/></testcase></testsuite></testsuites>"
    )
    tally.add("three", Ended(1, ""), tmp_path / "some.xml")
    assert tally.passed == 1
    assert tally.failed[2:] == ["three: a::left", "three: a::bad"]
    (tmp_path / "good.xml").write_text("<testsuites><testcase classname='a' name='good'/></testsuites>")
    tally.add("four", Ended(139, ""), tmp_path / "good.xml")
    tally.add("five", Ended(None, "", "it hangs"), tmp_path / "good.xml")
    assert tally.failed[4:] == ["four: the run ended with status 139", "five: it hangs"]
