"""`kvplug pools`, `kvplug stat` and `kvplug rm`: the pools on this host."""

from __future__ import annotations

import dataclasses
import pwd
import time
from typing import Annotated, Any

import typer

from kvplug.cli import output
from kvplug.sizes import format_size

__all__ = ["pools", "rm", "stat"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PoolName = Annotated[str | None, typer.Option("--pool", help="Name of the pool. Default: the setting pool.")]


def _wanted(pool: str | None) -> str:
    """What --pool names, though it be nothing, which is no name; without it the pool that is configured."""
    from kvplug.config import load

    return load(pool=pool).pool


def _owner(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _age(created_unix_s: float) -> str:
    if created_unix_s <= 0:
        return "?"
    seconds = max(0, int(time.time() - created_unix_s))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def pools(as_json: Json = False) -> None:
    """List the pools on this host, with size, owner and number of attached processes."""
    from kvplug.shm.segment import list_pools

    found = list_pools()
    if as_json:
        output.emit_json([dataclasses.asdict(pool) for pool in found])
        return
    if not found:
        output.say("no pools on this host")
        return
    table = output.table(
        "pool",
        "format",
        "size",
        "reserved",
        "owner",
        "mode",
        "age",
        "clients",
        "",
        right=("size", "reserved", "clients"),
    )
    for pool in found:
        state = "in use" if pool.clients_alive > 0 else "unused" if pool.clients_alive == 0 else "perhaps in use"
        if not pool.usable:
            state = f"{state}; {pool.problem}" if pool.clients_alive else pool.problem
        table.add_row(
            output.cell(pool.name),
            str(pool.format),
            format_size(pool.size_bytes),
            format_size(pool.reserved_bytes),
            output.cell(_owner(pool.uid)),
            f"{pool.mode:04o}",
            _age(pool.created_unix_s),
            str(pool.clients_alive) if pool.clients_alive >= 0 else "?",
            output.cell(state, style="" if pool.usable else "yellow"),
        )
    output.show(table)


def stat(pool: PoolName = None, as_json: Json = False) -> None:
    """Print a pool's statistics. This attaches no client, so it also works when the pool takes no more of them."""
    from kvplug.shm.visit import visit

    with visit(_wanted(pool)) as seen:
        figures: dict[str, Any] = dataclasses.asdict(seen.stats())
    if as_json:
        output.emit_json(figures)
        return
    parts = {name: value for name, value in figures.items() if isinstance(value, tuple | list)}
    table = output.table("statistic", "value", "", right=("value",))
    for name, value in figures.items():
        if name not in parts:
            meaning = format_size(value) if name.endswith("_bytes") and isinstance(value, int) else ""
            table.add_row(output.cell(name), output.cell(_number(value)), meaning)
    output.show(table)
    for name, entries in parts.items():
        if entries:
            columns = list(entries[0])
            listed = output.table(*columns, right=tuple(columns))
            for entry in entries:
                listed.add_row(*(_number(value) for value in entry.values()))
            output.say(f"\n{name}")
            output.show(listed)
    if figures["thread_errors"] or figures["dead_threads"]:
        output.complain(
            "kvplug's threads in attached processes met errors of its own. Their logs have the details, after "
            "'kvplug: an error in thread'. Please report them"
        )


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def rm(
    pool: PoolName = None,
    force: Annotated[
        bool, typer.Option("--force", help="Remove it although processes are attached. They store nothing more.")
    ] = False,
) -> None:
    """Remove a pool and free its memory. Refused while a process is attached, unless --force is given."""
    from kvplug.shm.segment import remove_pool

    name = _wanted(pool)
    remove_pool(name, force=force)
    output.say(f"removed pool {name}")
