"""Functions of an engine that kvplug goes around, and whether they still lead to kvplug.

Others hook the same functions: another plugin, a user's own patch, the engine's own subclass. Whoever comes later may
call what was there before, or not. So whether a hook is in place is no mark on a function, which ``functools.wraps``
copies to whatever replaces it, but whether the function that stands there now has a way to the hook.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST_LOOKED_AT = 256
"""Functions: more than any chain of wrappers has."""
_made: dict[tuple[object, str], list[Any]] = {}


def leads_to(function: Any, hooks: Sequence[Any]) -> bool:
    """Whether one of ``hooks`` is this function, or is held by it or by what it wraps.

    Held: in a closure, a default, a bound method or a partial, as ``__wrapped__``, or as a global that the code of a
    wrapper names. Whether it is called is not known.
    """
    seen: dict[int, Any] = {}
    ahead = [function]
    while ahead and len(seen) < MOST_LOOKED_AT:
        one = ahead.pop(0)
        if any(one is hook for hook in hooks):
            return True
        if id(one) not in seen:
            seen[id(one)] = one
            ahead += [held for held in _held(one) if id(held) not in seen]
    return False


def _held(one: Any) -> Iterator[Any]:
    """Functions, and what stands for one, that this one can call without being told of them."""
    found: list[Any] = []
    if isinstance(one, (types.MethodType, classmethod, staticmethod)):
        found.append(one.__func__)
    elif isinstance(one, functools.partial):
        found += [one.func, *one.args, *one.keywords.values()]
    elif isinstance(one, types.FunctionType):
        for cell in one.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        found += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
        found += [one.__globals__[name] for name in one.__code__.co_names if name in one.__globals__]
    found.append(getattr(one, "__wrapped__", None))
    kinds = (types.FunctionType, types.MethodType, classmethod, staticmethod, functools.partial)
    return (each for each in found if isinstance(each, kinds))


def put_around(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Puts ``make(function)`` in the place of the function that ``owner`` has under this name.

    A second call changes nothing, unless somebody has replaced the function meanwhile by one that does not lead to it.
    """
    plain = getattr(owner, name)
    made = _made.setdefault((owner, name), [])
    if not leads_to(plain, made):
        made.append(make(plain))
        setattr(owner, name, made[-1])
