"""What is set: the raw values of the environment and of the settings file, by name, before anything is checked.

This is all that the commands need that only want to know which pool is meant, so it imports little. ``kvplug.config``
has the schema of the values and reads them here as well.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvplug.errors import ConfigError, DecodeError
from kvplug.home import xdg_folder
from kvplug.outside import decoded_by
from kvplug.sizes import format_size

__all__ = [
    "ENV_PREFIX",
    "GIVEN",
    "NAMES",
    "POOL_MEANING",
    "Layer",
    "checked_pool_name",
    "config_path",
    "default_pool_name",
    "from_environment",
    "from_file",
    "merged",
    "nearest",
    "pool_name",
    "sound",
    "unfit",
]

ENV_PREFIX: Final = "KVPLUG_"
PATH_ENV: Final = "KVPLUG_CONFIG"
RESERVED_ENV: Final = frozenset(
    {PATH_ENV, "KVPLUG_ENABLE", "KVPLUG_KERNELS", "KVPLUG_SGLANG_MODE", "KVPLUG_FAILPOINT", "KVPLUG_PEER_FAULT"}
)
"""Variables that are read elsewhere and are not settings of the schema."""
RESERVED_ENV_PREFIXES: Final = ("KVPLUG_TEST_", "KVPLUG_BENCH_", "KVPLUG_DEMO_")
_FOREIGN_ENV: Final = re.compile(r"KVPLUG_(?:\w+_)?(?:SERVICE_(?:HOST|PORT\w*)|PORT(?:_\d+_\w+)?)")
"""What Kubernetes puts into every container of a namespace that has a service named "kvplug..."."""

NAMES: Final = (
    "pool",
    "size",
    "verify",
    "policy",
    "persist",
    "lock_timeout_s",
    "min_block",
    "slab",
    "prefault",
    "quarantine_grace_s",
    "pin_budget_share",
    "reserve_budget_share",
    "store_hold_share",
    "weights_id",
    "trust_mm_ids",
    "unsupported_engine_ok",
    "cuda",
    "agent_listen",
    "agent_advertise",
    "auth_key",
    "tls_cert",
    "tls_key",
    "tls_ca",
    "lease_s",
    "peer_timeout_s",
    "peer_connections",
    "data_path",
    "verbs_binding",
    "verbs_device",
    "agent_pin_share",
    "cache_node",
    "peers",
    "directory_url",
    "directory_ttl_s",
    "directory_timeout_s",
    "fetch_timeout_s",
)
"""Every setting, in the order of the schema (a test compares them): a name that is none of these is an error."""

POOL_NAME: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
POOL_MEANING: Final = "Name of the pool. Engines of one user that name the same pool share it."
GIVEN: Final = "given in the code"
"""The source of a value that is in neither layer."""
_MAX_FILE_BYTES: Final = 1 << 20
Layer = dict[str, tuple[Any, str]]
"""Name to (value, source)."""


def default_pool_name() -> str:
    """``u<uid>``: a pool per user, since pools are never shared between users."""
    return f"u{os.getuid()}"


def checked_pool_name(value: str) -> str:
    """What was given. Raises ValueError for what can't be a pool's name."""
    if not re.fullmatch(POOL_NAME, value, re.ASCII):
        raise ValueError("a pool name is 1 to 64 of the characters A-Z a-z 0-9 . _ - and does not start with a dot")
    return value


def pool_name(given: str | None = None) -> str:
    """The pool that is meant: *given*, else the one that is set, else the default. No other value is checked.

    Raises :class:`~kvplug.errors.ConfigError` for what is no pool's name, a setting that nobody knows, or a file that
    can't be used.
    """
    layers = merged()
    if given is not None:
        value, source = given, GIVEN
    else:
        value, source = layers.get("pool", (default_pool_name(), "default"))
    try:
        if not isinstance(value, str):
            raise ValueError("Input should be a valid string")  # as the schema has it
        return checked_pool_name(value)
    except ValueError as error:
        raise ConfigError(unfit("pool", repr(value), source, str(error), POOL_MEANING)) from None


def merged() -> Layer:
    """All that is set, the environment over the file. Raises ConfigError."""
    in_environment = sound(from_environment())
    return sound(from_file()) | in_environment


def sound(layer: tuple[Layer, list[str]]) -> Layer:
    """A layer in which nothing is wrong. Raises ConfigError."""
    found, wrong = layer
    if wrong:
        raise ConfigError("; and ".join(wrong))
    return found


def unfit(name: str, shown: str, source: str, message: str, about: str) -> str:
    """What is wrong with a value, as one sentence: value, source, what fits."""
    return f"setting {name} = {shown} ({source}): {message}. ({name}: {about})"


def config_path() -> tuple[Path, bool]:
    """The settings file, and whether it was asked for by name (then it has to be there)."""
    named = os.environ.get(PATH_ENV)
    if named:
        return Path(os.path.expanduser(named)), True
    return Path(xdg_folder("XDG_CONFIG_HOME", ".config")) / "kvplug" / "config.toml", False


def nearest(name: str, prefix: str = "") -> str:
    """What was probably meant by *name*, which is written without *prefix*."""
    import difflib

    close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
    written = [prefix + (known.upper() if prefix else known) for known in (close or NAMES)]
    return f"did you mean {written[0]}?" if close else f"the known ones are {', '.join(written)}."


def from_environment() -> tuple[Layer, list[str]]:
    """The settings in the environment, and what is wrong there. Set to nothing counts as unset."""
    found: Layer = {}
    wrong = []
    for variable, value in os.environ.items():
        if (
            not variable.startswith(ENV_PREFIX)
            or variable in RESERVED_ENV
            or variable.startswith(RESERVED_ENV_PREFIXES)
        ):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name in NAMES and variable == variable.upper():
            if not _is_text(value):
                wrong.append(f"{variable} in the environment has bytes in it that are not UTF-8: write it again")
            elif value.strip():
                found[name] = (value, f"environment {variable}")
        elif not _FOREIGN_ENV.fullmatch(variable):
            wrong.append(
                f"unknown setting {variable} in the environment: {nearest(name, ENV_PREFIX)} "
                f"Unset it or correct its name; `kvplug config` lists all settings."
            )
    return found, wrong


def _is_text(value: str) -> bool:
    """Whether a variable's bytes were UTF-8: Python keeps what was not as lone surrogates, which nothing can encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_file(path: Path) -> str:
    """The settings file's text. OSError, or ValueError: it is not text."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody writes to is not waited for
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("it is a folder, not a file")
        if not (stat.S_ISREG(mode) or os.path.samefile(fd, os.devnull)):
            raise ValueError("it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    finally:
        os.close(fd)
    if len(raw) > _MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {format_size(_MAX_FILE_BYTES)}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})") from None


def _toml() -> Callable[[str], dict[str, Any]]:
    """What reads TOML. Most users have no file, and the parser is imported for those who do."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads


def from_file() -> tuple[Layer, list[str]]:
    """The settings in the file, and what is wrong there."""
    path, required = config_path()
    named = f"the settings file {path}" + f", named by {PATH_ENV}," * required
    try:
        os.lstat(path)
    except FileNotFoundError:
        missing = f"the settings file {path}, named by {PATH_ENV}, does not exist: create it or unset {PATH_ENV}"
        return {}, [missing] * required
    except (OSError, ValueError) as error:
        # A home that this user can't look into holds no settings of this user's.
        return {}, [f"{named} can't be used: {_why(error)}"] * required
    try:
        content = decoded_by(_toml(), _read_file(path), "its text")
    except DecodeError as error:
        return {}, [f"{named} can't be used: {error}. It is TOML: one `name = value` a line"]
    except FileNotFoundError:
        return {}, [f"{named} can't be used: it is a symbolic link that leads nowhere. Fix it or remove it"]
    except PermissionError:
        return {}, [
            f"{named} can't be used: this process (uid {os.geteuid()}) may not read it. Give it the right (chown, "
            f"chmod), or name another file in {PATH_ENV}"
        ]
    except (OSError, ValueError) as error:
        return {}, [f"{named} can't be used: {_why(error)}"]
    known = {name: (value, f"file {path}") for name, value in content.items() if name in NAMES}
    return known, [
        f"unknown setting {name!r} in the file {path}: {nearest(name)}" for name in content if name not in known
    ]


def _why(error: OSError | ValueError) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)
