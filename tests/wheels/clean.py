"""A machine on which nobody has prepared anything, as far as one command is concerned.

The command runs as a user with a number that no file knows, in a namespace of mounts of its own where need be, with a
HOME that can't be written, a path on which nothing but the environment lies, and no variable but those given.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

UNKNOWN_UID = 47_110
RUN_TIMEOUT_S = 600
INSTALL_TIMEOUT_S = 900
OLDEST, NEWEST = (3, 10), (3, 13)


class Environment:
    """A Python of its own with one wheel and what that depends on."""

    def __init__(self, python: Path, wheel: Path, folder: Path) -> None:
        """``python``: an interpreter that has venv; ``folder``: an empty one that everybody may enter."""
        self.folder = folder
        self._base = Path(_ask(python, "import sys; print(sys.base_prefix)"))
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True, timeout=INSTALL_TIMEOUT_S)
        self.python = folder / "venv" / "bin" / "python"
        install = [self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel)]
        subprocess.run(install, check=True, timeout=INSTALL_TIMEOUT_S)
        self.package = Path(_ask(self.python, "import kvplug; print(kvplug.__path__[0])", isolated=True))
        (folder / "home").mkdir(mode=0o555)

    def run(
        self, *command: str | Path, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """The command's output."""
        plain = {"HOME": str(self.folder / "home"), "PATH": str(self.python.parent), "LANG": "C.UTF-8"}
        given = [str(part) for part in command]
        if os.geteuid() == 0:
            given = [*_setpriv(), *given]
            if not _enterable(self._base):  # the interpreter lies in a folder of root's: it is seen elsewhere
                given = [str(shutil.which("unshare")), "--mount", "/bin/sh", "-c", self._elsewhere(given)]
        return subprocess.run(
            given,
            env={**plain, **(env or {})},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=check,
        )

    def _elsewhere(self, command: Sequence[str]) -> str:
        """Shell words: an empty folder in place of those that can't be entered, with the interpreter in it."""
        closed = next(folder for folder in reversed(self._base.parents) if not folder.stat().st_mode & 0o001)
        kept = self.folder / "interpreter"
        kept.mkdir(exist_ok=True)
        return " && ".join(
            (
                shlex.join(["/bin/mount", "--bind", str(self._base), str(kept)]),
                shlex.join(["/bin/mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(closed)]),
                shlex.join(["/bin/mkdir", "-p", str(self._base)]),
                shlex.join(["/bin/mount", "--bind", str(kept), str(self._base)]),
                "exec " + shlex.join(command),
            )
        )


def _setpriv() -> list[str]:
    return [
        str(shutil.which("setpriv")),
        f"--reuid={UNKNOWN_UID}",
        f"--regid={UNKNOWN_UID}",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ]


def _enterable(folder: Path) -> bool:
    return all(one.stat().st_mode & 0o001 for one in (folder, *folder.parents))


def _ask(python: Path, code: str, isolated: bool = False) -> str:
    command = [python, *(["-I"] if isolated else []), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout.strip()


@contextmanager
def folder_for_everybody() -> Iterator[Path]:
    """An empty folder that every user may enter, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="kvplug-clean-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def pythons() -> dict[str, Path]:
    """Supported interpreters that are here, by version; the running one is among them."""
    found = {}
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        version = f"3.{minor}"
        if sys.version_info[:2] == (3, minor):
            found[version] = Path(sys.base_prefix) / "bin" / f"python{version}"
            continue
        inside = Path.home() / ".pyenv" / "versions"
        places = sorted(inside.glob(f"{version}.*/bin/python{version}"))
        if named := shutil.which(f"python{version}"):
            places.append(Path(named))
        if working := [place for place in places if _works(place)]:
            found[version] = working[-1]
    return found


def _works(python: Path) -> bool:
    """A version manager's stand-in is on the path for versions that it would not start."""
    run = subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True, check=False)
    return run.returncode == 0
