"""Makes the compiled libraries: ``python -m kvplug.shm.build`` for this machine, or with other levels named.

numba translates each entry into LLVM's language once, and what it calls, with a wrapper of plain C around it. All of
them are linked into one module, so that what they share is there once. LLVM then optimises and emits this module for
each level of the processor, and the C compiler links it with ``native/caller.c``, which Python calls.

Kernels allocate nothing and count no references, so what is emitted may refer to the C library only: anything else is
an error here. A library that was made of the same sources is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from typing import Any, Final

from kvplug.shm import native

LIBC: Final = frozenset(
    [
        "__errno_location",
        "bcmp",
        "clock_gettime",
        "fcntl",
        "flock",
        "getpid",
        "kill",
        "memcmp",
        "memcpy",
        "memmove",
        "memset",
        "sched_yield",
        "usleep",
    ]
)
"""All that a kernel may call. memset and its like are LLVM's own doing."""
TRIPLES: Final = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
SAID_CHARACTERS: Final = 2000
"""As much of another program's complaint is passed on."""
MODULES: Final = [
    "arrival",
    "copy",
    "events",
    "failpoints",
    "forecast",
    "index",
    "integrity",
    "lock",
    "objects",
    "pins",
    "read",
    "reap",
    "scan",
    "slabs",
    "write",
]
"""Modules that have an entry (tests compare them with the sources)."""
LETTERS: Final = {
    "int64[::1]": "q",
    "int8[::1]": "b",
    "int32[::1]": "i",
    "boolean[::1]": "?",
    "int64[:,::1]": "K",
    "int64": "n",
    "boolean": "t",
    "void": "v",
    "UniTuple(int64, 2)": "2",
}
"""numba's name of a type, and caller.c's."""


class BuildError(RuntimeError):
    """The library can't be made here."""


# ---------------------------------------------------------------------------------------------------------------
# In a child, where numba does not optimise: from Python to one LLVM module


def _wrap(name: str, compiled: Any, arguments: Any) -> Any:
    """numba's library of ``int64 kvplug_NAME(const int64 *words, int64 *out)`` around an entry: 1 if it raised."""
    from llvmlite import ir
    from numba import types

    context = compiled.target_context
    library = context.codegen().create_library(name)
    library.add_linking_library(compiled.library)
    module = library.create_ir_module(name)
    i64 = ir.IntType(64)
    wrapper = ir.Function(module, ir.FunctionType(i64, [i64.as_pointer()] * 2), f"kvplug_{name}")
    builder = ir.IRBuilder(wrapper.append_basic_block("entry"))
    words, out = wrapper.args
    values, at = [], 0
    for type_ in arguments:
        value, used = _argument(context, builder, words, at, type_)
        values.append(value)
        at += used
    result = compiled.signature.return_type
    inner = context.declare_function(module, compiled.fndesc)
    status, answer = context.call_conv.call_function(builder, inner, result, arguments, values)
    if isinstance(result, types.UniTuple):
        for i in range(result.count):
            builder.store(builder.extract_value(answer, i), builder.gep(out, [ir.Constant(i64, i)]))
    elif result != types.none:
        builder.store(answer, out)
    builder.ret(builder.zext(status.is_error, i64))
    library.add_ir_module(module)
    return library


def _argument(context: Any, builder: Any, words: Any, at: int, type_: Any) -> tuple[Any, int]:
    """(value of an argument that begins in word ``at``, number of words that it takes), as caller.c puts them."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.np.arrayobj import populate_array

    i64 = ir.IntType(64)

    def word(i: int) -> Any:
        return builder.load(builder.gep(words, [ir.Constant(i64, at + i)]))

    if not isinstance(type_, types.Array):
        value = word(0)
        return (builder.icmp_signed("!=", value, ir.Constant(i64, 0)) if type_ == types.boolean else value), 1
    item = context.get_data_type(type_.dtype)
    nbytes = ir.Constant(i64, context.get_abi_sizeof(item))
    shape = [word(1 + d) for d in range(type_.ndim)]
    strides = [nbytes] if type_.ndim == 1 else [builder.mul(nbytes, shape[1]), nbytes]
    array = context.make_array(type_)(context, builder)
    populate_array(
        array,
        data=builder.inttoptr(word(0), item.as_pointer()),
        shape=cgutils.pack_array(builder, shape, i64),
        strides=cgutils.pack_array(builder, strides, i64),
        itemsize=nbytes,
        meminfo=None,
    )
    return array._getvalue(), 1 + type_.ndim


def _only_translate() -> None:
    """Nothing is run in this process: numba neither optimises, nor links, nor makes code, which is most of its work."""
    import numba
    from numba.core.codegen import CPUCodeLibrary
    from numba.core.cpu import CPUContext

    from kvplug.shm import jit

    def finalize(library: Any) -> None:
        library._finalized = True

    def optimise(library: Any, module: Any) -> None:
        module.data_layout = library._codegen._data_layout

    warnings.simplefilter("ignore", numba.NumbaWarning)
    CPUCodeLibrary.finalize, CPUCodeLibrary._optimize_functions = finalize, optimise
    CPUContext.get_executable = lambda *_: [].append  # it wants a function in C, which no two kernels have in common
    jit.njit = lambda **_: numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _link_all(libraries: list[Any]) -> str:
    """One module of what numba put into these libraries and into those that they need, each once."""
    import llvmlite.binding as llvm

    whole = llvm.parse_assembly("")
    seen: set[int] = set()
    while libraries:
        library = libraries.pop(0)
        if id(library) not in seen:
            seen.add(id(library))
            whole.link_in(library._final_module, preserve=True)
            libraries += library._linking_libraries
    return str(whole)


def _lower(machine: str, folder: pathlib.Path) -> None:
    """Write the module of all entries, ``kernels.ll``, and the table of them that caller.c includes, ``kernels.h``."""
    import importlib

    from numba.core import sigutils

    from kvplug.shm import jit

    platform.machine = lambda: machine  # which intrinsics are emitted
    _only_translate()
    for module in MODULES:
        importlib.import_module(f"kvplug.shm.{module}")
    head = f'#define KVPLUG_SOURCES "{jit.STAMP[0]}"\n#define KVPLUG_CALLER "{_caller_stamp()}"'
    libraries, table = [], ["#ifndef KVPLUG_SOURCES", head, "#endif"]
    for dispatcher, signature in sorted(jit.entries(), key=lambda entry: jit.export_name(entry[0])):
        name = jit.export_name(dispatcher)
        result, argument_types = jit.types_of(signature)
        spelled = f"{result}({', '.join(argument_types)})"
        arguments, _ = sigutils.normalize_signature(spelled)
        dispatcher.compile(spelled)
        libraries.append(_wrap(name, dispatcher.overloads[tuple(arguments)], tuple(arguments)))
        letters = "".join(LETTERS[t] for t in argument_types)
        table.append(f"KERNEL({name}, \"{letters}\", '{LETTERS[result]}')")
    (folder / "kernels.ll").write_text(_link_all(libraries))
    (folder / "kernels.h").write_text("\n".join(table) + "\n")


def _lower_in_child(machine: str, folder: pathlib.Path) -> None:
    """In a process of its own: whether numba optimises, and which intrinsics there are, is decided when it starts."""
    environment = {
        **os.environ,
        native.ENV: "numba",
        "NUMBA_OPT": "0",
        "NUMBA_CACHE_DIR": str(folder / "cache"),  # what is not optimised must not be found by others
    }
    command = [sys.executable, "-m", "kvplug.shm.build", "--lower", machine, str(folder)]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"numba could not translate the kernels:\n{run.stderr[-SAID_CHARACTERS:]}")


# ---------------------------------------------------------------------------------------------------------------
# From the module to libraries


def emit(text: str, machine: str, level: str) -> bytes:
    """Object code of the module for one level of a machine's processors."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    cpu = "" if level == "armv8-a" else level
    target = llvm.Target.from_triple(TRIPLES[machine]).create_target_machine(
        cpu=cpu, opt=3, reloc="pic", codemodel="default"
    )
    module.triple, module.data_layout = TRIPLES[machine], str(target.target_data)
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and not value.name.startswith("kvplug_"):
            value.linkage = "internal"

    def optimise(speed: int, *passes: str) -> None:
        builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed))
        manager = builder.getModulePassManager()
        for name in passes:
            getattr(manager, f"add_{name}_pass")()
        manager.run(module, builder)

    # The order is numba's: first what is cheap, so that references that are taken and given back meet in one function.
    optimise(0, "global_dead_code_eliminate", "loop_rotate", "instruction_combine", "jump_threading", "refprune")
    optimise(3, "refprune")
    optimise(0, "global_dead_code_eliminate")
    outside = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    outside |= {v.name for v in module.global_variables if v.is_declaration}
    if not outside <= LIBC:
        raise BuildError(f"the kernels need what the library can't have: {', '.join(sorted(outside - LIBC))}")
    return bytes(target.emit_object(module))


def compiler_for(machine: str) -> list[str]:
    """A C compiler that links for this machine: CC, this machine's own, or zig's, which a package brings."""
    if asked := os.environ.get("CC"):
        return shlex.split(asked)
    if machine == platform.machine():
        for name in ("cc", "gcc", "clang"):
            if shutil.which(name):
                return [name]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise BuildError(f"there is no C compiler for {machine} here: install gcc, or `pip install ziglang`") from None
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.2.28"]


def link(emitted: bytes, machine: str, folder: pathlib.Path, to: pathlib.Path) -> None:
    """One shared library of the emitted kernels and their callers, put in its place in one step."""
    import numpy as np

    (folder / "emitted.o").write_bytes(emitted)
    made = folder / to.name
    command = [
        *compiler_for(machine),
        *("-O2", "-std=c11", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-s", "-Wl,--build-id=none"),
        *("-I", sysconfig.get_paths()["include"], "-I", np.get_include(), "-I", str(folder)),
        *(str(native.FOLDER / "caller.c"), str(folder / "emitted.o"), "-o", str(made)),
    ]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{run.stderr[-SAID_CHARACTERS:]}")
    to.parent.mkdir(exist_ok=True)
    # Beside its place first: a process that has the old one mapped keeps it.
    beside = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.copyfile(made, beside)
    os.replace(beside, to)


def _caller_stamp() -> str:
    return hashlib.blake2b((native.FOLDER / "caller.c").read_bytes(), digest_size=16).hexdigest()


def is_made(level: str) -> bool:
    """Whether the library of a level is there, made of the sources that are there now."""
    try:
        made = native.library_path(level).read_bytes()
    except OSError:
        return False
    return all(stamp.encode() + b"\0" in made for stamp in (native.sources_stamp()[0], _caller_stamp()))


def build(machine: str, levels: list[str]) -> None:
    """Make the libraries of these levels that are missing or of other sources. BuildError says why one can't be."""
    missing = [level for level in levels if not is_made(level)]
    if not missing:
        return
    compiler_for(machine)  # before the long part
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvplug-build-") as name:
        folder = pathlib.Path(name)
        _lower_in_child(machine, folder)
        text = (folder / "kernels.ll").read_text()
        for level in missing:
            link(emit(text, machine, level), machine, folder, native.library_path(level))
            print(f"made {native.library_path(level)}")  # noqa: T201
    print(f"took {time.monotonic() - began:.0f} s")  # noqa: T201


def main(arguments: list[str] | None = None) -> int:
    """The command's exit status: 1 where nothing could be made, which is said."""
    parser = argparse.ArgumentParser(prog="python -m kvplug.shm.build", description=__doc__)
    parser.add_argument("--machine", choices=list(native.LEVELS), default=platform.machine())
    parser.add_argument(
        "--level", action="append", help="by default all of the machine; `best`: the best that runs here"
    )
    parser.add_argument("--lower", nargs=2, metavar=("MACHINE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.lower:
        _lower(given.lower[0], pathlib.Path(given.lower[1]))
        return 0
    levels = given.level or list(native.LEVELS.get(given.machine, {}))
    levels = native.levels_here()[:1] if levels == ["best"] else levels
    try:
        if not levels:
            raise BuildError(f"no library is made for {given.machine}")
        build(given.machine, levels)
    except BuildError as error:
        print(f"no compiled library; numba compiles the kernels instead: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
