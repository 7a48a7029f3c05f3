"""What both bindings of the verbs do alike, over stand-ins for their modules. The verbs themselves: tests/rdma_lab."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvplug.errors import VerbsError
from kvplug.rdma.verbs import binding as b

NAME = "mlx5_7"
PORTS = [SimpleNamespace(state=state, active_mtu=4, max_msg_sz=1 << 30, lid=5) for state in (1, b.PORT_ACTIVE)]


class Machine:
    """One device, and what was done with it."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.error: Exception | None = None

    def does(self, what: str) -> None:
        if self.error is not None:
            raise self.error
        self.done.append(what)

    def thing(self, what: str, **attributes: Any) -> Any:
        """Something that can be closed."""
        return SimpleNamespace(close=lambda: self.does(f"close {what}"), **attributes)

    def region(self, address: int, nbytes: int, access: int) -> Any:
        self.does(f"register {address} {nbytes} {access}")
        return self.thing("region", lkey=3, rkey=4)

    def context(self, **attributes: Any) -> Any:
        self.does("open")
        limits = SimpleNamespace(phys_port_cnt=len(PORTS), max_mr=64, max_qp_rd_atom=16)

        def query_device() -> Any:
            self.does("query")
            return limits

        asked = {"query_device": query_device, "query_port": lambda number: PORTS[number - 1]}
        return self.thing("context", **asked, **attributes)


def ibverbs(machine: Machine) -> dict[str, ModuleType]:
    def domain() -> Any:
        return machine.thing("domain", reg_mr=machine.region)

    found = SimpleNamespace(name=NAME, open=lambda: machine.context(alloc_pd=domain))
    module: Any = ModuleType("ibverbs")
    module.get_device_list = lambda: [found]
    return {"ibverbs": module}


class PyverbsError(Exception):
    """pyverbs' own."""


def pyverbs(machine: Machine) -> dict[str, ModuleType]:
    def made(name: str) -> Any:
        if name != NAME:
            raise PyverbsError(f"there is no {name}")
        return machine.context()

    def region(domain: Any, nbytes: int, access: int, *, address: int) -> Any:
        return machine.region(address, nbytes, access)

    package: Any = ModuleType("pyverbs")
    for name in ("addr", "cq", "qp", "wr"):
        setattr(package, name, SimpleNamespace())
    package.device = SimpleNamespace(get_device_list=lambda: [SimpleNamespace(name=NAME.encode())], Context=made)
    package.pd = SimpleNamespace(PD=lambda context: machine.thing("domain"))
    package.mr = SimpleNamespace(MR=region)
    errors: Any = ModuleType("pyverbs.pyverbs_error")
    errors.PyverbsError = PyverbsError
    return {"pyverbs": package, "pyverbs.pyverbs_error": errors}


STAND_INS = {"ibverbs": (ibverbs, OSError(12, "no memory")), "pyverbs": (pyverbs, PyverbsError("no memory"))}


@pytest.fixture(params=STAND_INS)
def found(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[b.Binding, Machine]]:
    machine, module = Machine(), f"kvplug.rdma.verbs.binding_{request.param}"
    for name, stand_in in STAND_INS[request.param][0](machine).items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, module, raising=False)
    yield importlib.import_module(module).BINDING, machine
    monkeypatch.undo()
    sys.modules.pop(module, None)


def test_a_device_is_opened_asked_registered_with_and_closed(found: tuple[b.Binding, Machine]) -> None:
    binding, machine = found
    assert binding.devices() == [NAME]
    device = binding.open(NAME)
    assert device.ports() == [b.Port(NAME, 2, 5, 4, 1 << 30, 64, 16)]
    region = device.register(4096, 64, b.REMOTE_READ)
    assert (region.lkey, region.rkey) == (3, 4)
    region.close()
    device.close()
    closed = ["close region", "close domain", "close context"]
    assert machine.done == ["open", "query", f"register 4096 64 {b.REMOTE_READ}", *closed]


def test_what_a_binding_raises_is_an_error_of_the_verbs_that_says_what_was_done(
    found: tuple[b.Binding, Machine],
) -> None:
    binding, machine = found
    with pytest.raises(VerbsError, match=r"there is no .*mlx5_8"):
        binding.open("mlx5_8")
    device = binding.open(NAME)
    region = device.register(4096, 64, b.LOCAL_WRITE)
    machine.error = STAND_INS[binding.name][1]
    for call, what in (
        (lambda: binding.open(NAME), f"open {NAME}"),
        (device.ports, f"ask {NAME} for its ports"),
        (lambda: device.register(0, 64, b.LOCAL_WRITE), f"register 64 bytes with {NAME}"),
        (region.close, "deregister memory"),
        (device.close, f"close {NAME}"),
    ):
        with pytest.raises(VerbsError, match=f"^{what}: no memory$"):
            call()
