"""All of kvplug's settings, in one schema.

A value comes from the first of: the code's own arguments, the environment (``KVPLUG_SIZE=30gb``), the file (TOML, at
``KVPLUG_CONFIG`` or else ``~/.config/kvplug/config.toml``), the default. A name that nobody knows is an error, since
a setting that is silently ignored is worse than none; so is a value that does not fit, and either error says where
the value came from and what would fit. Sizes are written ``30gb`` (powers of 1000), ``512mib`` (powers of 1024) or
as plain bytes; durations are in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from kvplug import hostmem
from kvplug.endpoint import Endpoint, is_host_and_port
from kvplug.errors import ConfigError
from kvplug.layers import (
    ENV_PREFIX,
    GIVEN,
    POOL_MEANING,
    checked_pool_name,
    config_path,
    default_pool_name,
    from_environment,
    from_file,
    merged,
    nearest,
    unfit,
)
from kvplug.sizes import format_size, parse_size

__all__ = [
    "ENV_PREFIX",
    "Config",
    "Setting",
    "config_path",
    "default_pool_name",
    "default_size_bytes",
    "explain",
    "load",
]

SECRETS = frozenset({"auth_key", "directory_url"})
UNQUOTED = {
    "auth_key": "it must be a text of 16 to 4096 characters",
    "directory_url": "",
    "tls_cert": "it must be the path of a PEM file",
    "tls_key": "it must be the path of a PEM file",
    "tls_ca": "it must be the path of a PEM file",
}
"""What errors never quote, as a secret may stand there, and what they say instead of pydantic's words, which may give
away a length; empty: the words are ours."""
HIDDEN = "(set, not shown)"
MIB = 1024**2
_SIZE_STEP_BYTES = 2 * MIB
_MIN_SIZE_BYTES = MIB


def default_size_bytes() -> int:
    """A quarter of the memory that this container may use, at most half of what it and /dev/shm have left for a pool.

    The half is for what comes later; a default that is made at once fits wherever any pool does.
    """
    limits = []
    memory = hostmem.memory()
    if memory.limit_bytes:
        limits.append(memory.limit_bytes // 4)
    room = hostmem.room()
    if room is not None:
        limits.append(room.nbytes // 2)
    nbytes = min(limits, default=_SIZE_STEP_BYTES)
    return max(nbytes - nbytes % _SIZE_STEP_BYTES, _SIZE_STEP_BYTES)


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str | int) else value


def _size_or_auto(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "auto" else _size(value)


def _addresses(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _address(value: str) -> str:
    if not is_host_and_port(value):
        raise ValueError(f"{value!r} is not host:port, such as 10.0.0.7:9410 or [::1]:9410")
    return value


Size = Annotated[int, BeforeValidator(_size)]
Address = Annotated[str, AfterValidator(_address)]
Secret = Annotated[SecretStr, Field(max_length=4096)]
Share = Annotated[float, Field(gt=0, le=1)]


class Config(pydantic.BaseModel):
    """The settings of one process, checked. Immutable; :meth:`with_changes` makes another.

    Every way of making one raises :class:`~kvplug.errors.ConfigError` for a name or a value that does not fit.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)

    pool: str = Field(
        default_factory=default_pool_name,
        description=POOL_MEANING,
    )
    size: Size = Field(
        default_factory=default_size_bytes,
        description=(
            "Size of the pool, used by the process that creates it. "
            "A process that attaches takes the size that is there."
        ),
    )
    verify: Literal["never", "always"] = Field(
        default="never",
        description="When a block's checksum is checked at a local read. Blocks from another host are always checked.",
    )
    policy: Literal["tail_first", "lru", "fifo"] = Field(
        default="tail_first", description="Order in which unpinned blocks are evicted when the pool is full."
    )
    persist: Literal["always", "until-last-exit"] = Field(
        default="always",
        description="Whether the pool stays when its last process exits. A pool that stays makes the next start warm.",
    )
    lock_timeout_s: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description=(
            "Maximum wait for the pool's lock, in seconds. After it a lookup is a miss and a block is not stored."
        ),
    )
    min_block: Size = Field(
        default=16 * 1024,
        ge=4096,
        le=64 * MIB,
        description=(
            "Smallest expected block, a power of two. Sets the size of the pool's tables when the pool is created."
        ),
    )
    slab: Annotated[int | None, BeforeValidator(_size_or_auto)] = Field(
        default=None,
        ge=4096,
        description=(
            "Size of a slab, the unit that moves between block sizes, a multiple of min_block. auto: derived from size."
        ),
    )
    prefault: bool = Field(
        default=True, description="Reserve the pool's memory in the background, ahead of its first use."
    )
    quarantine_grace_s: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        description="Time for which a slot stays unused after the engine that was writing it has died, in seconds.",
    )
    pin_budget_share: Share = Field(
        default=0.5, description="Maximum share of the pool's slots that one process may pin."
    )
    reserve_budget_share: Share = Field(
        default=0.5, description="Maximum share of the pool's slots that one process may be writing at a time."
    )
    store_hold_share: Share = Field(
        default=0.2,
        description=(
            "Maximum share of the engine's own cache blocks that stores in flight may hold. Above it no store begins."
        ),
    )
    weights_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description=(
            "Identifier of the model's weights, for weights that kvplug cannot identify by content. "
            "A wrong one serves wrong blocks."
        ),
    )
    trust_mm_ids: bool = Field(
        default=False,
        description=(
            "Treat identifiers that users give to images, audio and video as content hashes. "
            "A reused one serves wrong blocks."
        ),
    )
    unsupported_engine_ok: bool = Field(
        default=False, description="Run with an engine version that kvplug was not tested with."
    )
    cuda: Literal["off", "on"] = Field(
        default="off",
        description="Copies for NVIDIA GPUs, not yet run on one. on: used if a check at start passes.",
    )

    # Between hosts.
    agent_listen: Address = Field(
        default="127.0.0.1:9410",
        description=(
            "Address on which `kvplug agent` listens; port 0 takes a free one. "
            "Beyond loopback it needs auth_key or TLS."
        ),
    )
    agent_advertise: Address | None = Field(
        default=None, description="Address by which other hosts reach this agent. Default: agent_listen."
    )
    auth_key: Secret | None = Field(
        default=None,
        min_length=16,
        description=(
            "Shared key of all hosts, at least 16 characters. "
            "Two hosts prove to each other that they have it. Never printed."
        ),
    )
    tls_cert: str | None = Field(
        default=None, description="Path of this host's certificate, PEM. Set all three tls_ settings or none."
    )
    tls_key: str | None = Field(default=None, description="Path of that certificate's private key, PEM.")
    tls_ca: str | None = Field(
        default=None, description="Path of the CA certificates that sign the hosts' certificates, PEM."
    )
    lease_s: float = Field(
        default=10.0,
        ge=0.5,
        le=600,
        description="Maximum time for which an agent pins blocks for a reader, in seconds.",
    )
    peer_timeout_s: float = Field(
        default=1.0,
        ge=0.05,
        le=60,
        description="Maximum wait for the next byte from a peer, in seconds. After it the blocks are misses.",
    )
    peer_connections: int = Field(
        default=4, ge=1, le=16, description="Number of connections over which one read from a peer is spread."
    )
    data_path: Literal["auto", "tcp", "verbs"] = Field(
        default="auto",
        description="Transport of blocks from a peer. auto: RDMA verbs if both hosts have a device, else TCP.",
    )
    verbs_binding: Literal["auto", "pyverbs", "ibverbs"] = Field(
        default="auto", description="Python binding of RDMA verbs. auto: pyverbs if it can be imported, else ibverbs."
    )
    verbs_device: Annotated[tuple[str, ...], BeforeValidator(_addresses)] = Field(
        default=(),
        max_length=64,
        description="RDMA devices to use, separated by commas. None: every device with a port up.",
    )
    agent_pin_share: Share = Field(default=0.25, description="Maximum share of the pool's bytes that leases may pin.")
    cache_node: bool = Field(
        default=False,
        description="Lend this host's pool: its agent takes over blocks that other hosts are about to evict.",
    )

    peers: Annotated[tuple[Address, ...], BeforeValidator(_addresses)] = Field(
        default=(), max_length=1024, description="Agents of other hosts, host:port, separated by commas."
    )
    directory_url: Secret | None = Field(
        default=None,
        description=(
            "URL of the Redis or Valkey that records which host has which blocks, such as redis://10.0.0.9:6379/0. "
            "Never printed."
        ),
    )
    directory_ttl_s: float = Field(
        default=6.0,
        ge=1,
        le=3600,
        description="Time after which a silent host no longer counts, in seconds. The same on all hosts.",
    )
    directory_timeout_s: float = Field(
        default=0.05,
        ge=0.001,
        le=10,
        description=(
            "Maximum wait for the directory's answer, in seconds. After it the known hosts are asked directly."
        ),
    )

    fetch_timeout_s: float = Field(
        default=1.5,
        ge=0.01,
        le=60,
        description="Maximum delay added to a request while its prefix is fetched from other hosts, in seconds.",
    )

    def __init__(self, /, **values: Any) -> None:
        layers = {name: entry for name, entry in merged().items() if name not in values}
        try:
            super().__init__(**{name: value for name, (value, _) in layers.items()}, **values)
        except pydantic.ValidationError as error:
            raise ConfigError("; and ".join(_explained(detail, layers) for detail in error.errors())) from None

    @pydantic.field_validator("pool")
    @classmethod
    def _pool_name(cls, value: str) -> str:
        return checked_pool_name(value)

    @pydantic.field_validator("size")
    @classmethod
    def _size_holds_tables(cls, value: int) -> int:
        if value < _MIN_SIZE_BYTES:
            raise ValueError("a pool has at least 2mib, or 1mib where slab is set to 64kib or less")
        return value

    @pydantic.field_validator("directory_url")
    @classmethod
    def _directory_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            Endpoint.parse(value.get_secret_value())
        return value

    @pydantic.field_validator("min_block")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(
                f"it must be a power of two, such as {1 << value.bit_length() - 1} or {1 << value.bit_length()}"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _slab_holds_blocks(self) -> Config:
        if self.slab is not None and self.slab % self.min_block:
            raise ValueError(f"slab ({self.slab} bytes) is not a multiple of min_block ({self.min_block} bytes)")
        return self

    @pydantic.model_validator(mode="after")
    def _tls_is_whole(self) -> Config:
        given = [name for name in ("tls_cert", "tls_key", "tls_ca") if getattr(self, name)]
        if len(given) not in (0, 3):
            raise ValueError(f"TLS needs tls_cert, tls_key and tls_ca; only {' and '.join(given)} set")
        return self

    @classmethod
    def defaults(cls) -> Config:
        """The defaults alone, whatever environment and file say."""
        return cls.model_construct()

    @property
    def asks_other_hosts(self) -> bool:
        """Whether blocks that this host's pool lacks are to be looked for on others."""
        return bool(self.peers) or self.directory_url is not None

    def with_changes(self, **changes: Any) -> Config:
        """The same settings but for *changes*, checked like any other; a change to None leaves the value as it is."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return Config(**values | {name: value for name, value in changes.items() if value is not None})


class Setting(NamedTuple):
    """One line of :func:`explain`."""

    name: str
    value: Any
    source: str
    """``default``, ``environment KVPLUG_SIZE``, ``file /path/config.toml``."""

    @property
    def text(self) -> str:
        """The value as it would be written in the file, sizes with their meaning."""
        if self.value is None:
            return "auto" if self.name == "slab" else "not set"
        if isinstance(self.value, tuple):
            return ", ".join(self.value) or "none"
        if self.name in ("size", "min_block", "slab"):
            return f"{self.value} ({format_size(self.value)})"
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


def _explained(detail: Any, sources: Mapping[str, tuple[Any, str]]) -> str:
    """What is wrong, as one sentence: value, source, what fits. A secret is not quoted, nor its length."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    name = str(detail["loc"][0]) if detail["loc"] else ""
    if not name:
        return f"settings that don't go together: {message}"
    value, source = sources.get(name, (detail["input"], GIVEN))
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name!r}, {source}: {nearest(name)}"
    about = Config.model_fields[name].description or ""
    shown = repr(value)
    if name in UNQUOTED:
        shown, message = HIDDEN, UNQUOTED[name] or message
    return unfit(name, shown, source, message, about)


def load(**overrides: Any) -> Config:
    """The settings of this process. *overrides* that are not None go over environment and file.

    Raises :class:`~kvplug.errors.ConfigError` for an unknown name or a value that does not fit.
    """
    return Config(**{name: value for name, value in overrides.items() if value is not None})


class GivenConfig(Config):
    """Settings of the values that are handed in, whatever environment and file say. Raises pydantic's own error."""

    def __init__(self, /, **values: Any) -> None:
        pydantic.BaseModel.__init__(self, **values)


def explain() -> tuple[list[Setting], list[str]]:
    """Each setting that is sound, as (name, value, source), in the schema's order; and each thing that is wrong."""
    (in_file, wrong), (in_environment, more) = from_file(), from_environment()
    layers, wrong = in_file | in_environment, wrong + more
    good, bad = dict(layers), set[str]()
    while True:  # each round has fewer of what was set
        try:
            config = GivenConfig(**{name: value for name, (value, _) in good.items()})
            break
        except pydantic.ValidationError as error:
            wrong += [_explained(detail, layers) for detail in error.errors()]
            named = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
            named = named or set(re.findall(r"\w+", wrong[-1]))  # settings that don't go together
            if not named & good.keys():
                raise
            bad |= named & good.keys()
            good = {name: entry for name, entry in good.items() if name not in named}
    return [
        Setting(name, _shown(name, getattr(config, name)), layers.get(name, (None, "default"))[1])
        for name in Config.model_fields
        if name not in bad
    ], wrong


def _shown(name: str, value: Any) -> Any:
    return HIDDEN if name in SECRETS and value is not None else value
