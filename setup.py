"""What pyproject.toml can't say: on an index page README stands alone, so its links into the checkout become paths.
When the sources have a public address, the links can lead there instead.

And a wheel may bring the compiled kernels for one machine: ``just wheels`` makes these, and names the machine in
``KVPLUG_WHEEL``. Without it a wheel is of Python alone, and numba compiles where it is installed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

MACHINE = os.environ.get("KVPLUG_WHEEL", "")
LEVELS = {"": 0, "x86_64": 3, "aarch64": 1}
"""How many libraries a machine's wheel has: kvplug/shm/native.py."""
OLDEST_GLIBC = "manylinux_2_28"


class ForOneMachine(Distribution):
    """A wheel with libraries goes where compiled packages go."""

    def has_ext_modules(self) -> bool:
        """Whether there are any, though setuptools has not made them."""
        return bool(MACHINE)


class BuildWithLibraries(build_py):
    """The sources, and the machine's libraries beside them."""

    def run(self) -> None:
        """Fails where a library is missing: such a wheel would be slow to start on some processors."""
        super().run()
        libraries = sorted((Path(__file__).parent / "shm" / "native" / MACHINE).glob("*.so")) if MACHINE else []
        if len(libraries) != LEVELS[MACHINE]:
            raise SystemExit(f"KVPLUG_WHEEL={MACHINE}, but it has {len(libraries)} libraries: `just native` makes them")
        folder = Path(self.build_lib) / "kvplug" / "shm" / "native" / MACHINE
        for library in libraries:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, folder / library.name)


class WheelForOneMachine(bdist_wheel):
    """Libraries use the stable interface of Python 3.10, and a C library that is not older than that of its tag."""

    def get_tag(self) -> tuple[str, str, str]:
        """(Python, its binary interface, platform)."""
        return ("cp310", "abi3", f"{OLDEST_GLIBC}_{MACHINE}") if MACHINE else super().get_tag()


def without_relative_links(text: str) -> str:
    """``[docs/faq.md](docs/faq.md)`` becomes ```docs/faq.md```, and another text keeps its words before the path.

    A picture becomes its words and path, too: an index shows none that lies in the checkout.
    """

    def plain(link: re.Match[str]) -> str:
        words, path = link[1], link[2]
        return f"`{path}`" if words == path else f"{words} (`{path}`)"

    return re.sub(r"!?\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", plain, text)


setup(
    distclass=ForOneMachine,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelForOneMachine},
    long_description=without_relative_links((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
