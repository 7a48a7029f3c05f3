"""`kvplug pools`, `kvplug stat` and `kvplug rm`: the pools on this host.

These three need nothing of the settings but the pool's name, so they do without the schema and what it imports.
"""

from __future__ import annotations

import pwd
import time

from kvplug.cli import output
from kvplug.layers import pool_name
from kvplug.sizes import format_size

__all__ = ["pools", "rm", "stat"]


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


def pools(*, as_json: bool) -> int:
    """List the pools."""
    from kvplug.shm.segment import list_pools

    found = list_pools()
    if as_json:
        output.emit_json([pool._asdict() for pool in found])
        return 0
    if not found:
        output.say("no pools on this host")
        return 0
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
            pool.name,
            str(pool.format),
            format_size(pool.size_bytes),
            format_size(pool.reserved_bytes),
            _owner(pool.uid),
            f"{pool.mode:04o}",
            _age(pool.created_unix_s),
            str(pool.clients_alive) if pool.clients_alive >= 0 else "?",
            output.cell(state, style="" if pool.usable else "yellow"),
        )
    output.show(table)
    return 0


def stat(*, pool: str | None, as_json: bool) -> int:
    """Print a pool's statistics."""
    name = pool_name(pool)
    from kvplug.shm.visit import visit

    with visit(name) as seen:
        figures = seen.stats().as_dict()
    if as_json:
        output.emit_json(figures)
        return 0
    parts = {name: value for name, value in figures.items() if isinstance(value, list)}
    table = output.table("statistic", "value", "", right=("value",))
    for name, value in figures.items():
        if name not in parts:
            meaning = format_size(value) if name.endswith("_bytes") and isinstance(value, int) else ""
            table.add_row(name, _number(value), meaning)
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
    return 0


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def rm(*, pool: str | None, force: bool) -> int:
    """Remove a pool."""
    name = pool_name(pool)
    from kvplug.shm.segment import remove_pool

    remove_pool(name, force=force)
    output.say(f"removed pool {name}")
    return 0
