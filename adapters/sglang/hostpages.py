"""Pages of SGLang's host pools as byte fragments, and which prefixes a set of found pages can restore.

A host pool says by ``get_page_buffer_meta(indices)`` where the bytes of its pages lie: addresses and lengths, the same
number of fragments for each page, one page after another (K and V of all layers where pages come first, K and V of
each layer where layers do). That order is the order of the bytes in a block, so the pool's class and layout are part of
the name that its keys are made under: an engine with another layout finds nothing, never the same bytes otherwise
ordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvplug.errors import EngineContractError, UnsupportedEngineError

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

KV: Final = "kv"
MAMBA: Final = "mamba"

ALL_PAGES: Final = "all_pages"
TRAILING_PAGES: Final = "trailing_pages"
BLOCK_GROUPS: Final = "block_groups"


def plain_name(name: Any) -> str:
    """A pool's name or a hit policy, which SGLang gives as a ``str`` enumeration or as a plain string."""
    return str(getattr(name, "value", name))


@dataclass(frozen=True)
class HostPages:
    """One of SGLang's host pools."""

    name: str
    pool: Any
    page_size: int
    """Indices per page: tokens, or 1 where a page is one recurrent state."""
    identity: str
    """What keys of this pool's pages are made under; equal on all ranks."""
    replicated: bool
    """Every tensor-parallel rank holds the same bytes, and one of them stores them."""
    logical: bool
    """The pool only counts pages; their bytes are in the pools beside it."""
    page_nbytes: int = 0
    """Bytes of a page; 0 where the pool only counts them."""

    def fragments(self, indices: Any, pages: int) -> tuple[Int64s, Int64s]:
        """Where the bytes of these pages lie.

        Args:
            indices: tensor int64 on the CPU of ``pages * page_size`` host indices, page by page.
            pages: their number.

        Returns:
            Addresses int64 (pages, F) and lengths in bytes int64 (pages, F).

        Raises:
            EngineContractError: the indices are not those of so many pages, or the pool answered with something else.
        """
        given = 0 if indices is None else int(indices.numel())
        if given != pages * self.page_size:
            raise EngineContractError(
                f"{given} host indices were given for {pages} pages of {self.page_size} in pool {self.name}"
            )
        addrs, nbytes = self.pool.get_page_buffer_meta(indices)
        if not len(addrs) or len(addrs) % pages or len(addrs) != len(nbytes):
            raise EngineContractError(
                f"host pool {self.name} has {len(addrs)} addresses and {len(nbytes)} lengths for {pages} pages"
            )
        return (
            np.array(addrs, dtype=np.int64).reshape(pages, -1),
            np.array(nbytes, dtype=np.int64).reshape(pages, -1),
        )


def host_pages(name: str, pool: Any, *, replicated: bool) -> HostPages:
    """What there is to know of a host pool.

    Args:
        name: SGLang's name of it.
        pool: the pool.
        replicated: its pages are the same on all tensor-parallel ranks.

    Raises:
        UnsupportedEngineError: the pool does not say where the bytes of its pages lie.
    """
    layout = str(getattr(pool, "layout", "none"))
    if getattr(pool, "stores_page_envelope", False) or getattr(pool, "shared_allocation_domain", None) is not None:
        raise UnsupportedEngineError(f"host pool {name} keeps several pools' pages in one piece")
    logical = getattr(pool, "kv_buffer", None) is None and int(getattr(pool, "size_per_token", 1) or 0) == 0
    page_size = int(getattr(pool, "page_size", 1) or 1)
    words = [name, type(pool).__name__, layout, str(getattr(pool, "dtype", "")), f"page {page_size}"]
    tag = getattr(pool, "storage_format_tag", None)
    pages = HostPages(
        name=name,
        pool=pool,
        page_size=page_size,
        identity=" ".join(word for word in (*words, tag) if word),
        replicated=replicated,
        logical=logical,
    )
    if not logical:
        import torch

        try:
            _, nbytes = pages.fragments(torch.arange(page_size, dtype=torch.int64), 1)
        except Exception as error:
            raise UnsupportedEngineError(
                f"host pool {name} ({type(pool).__name__}, layout {layout}) gives no addresses of its pages: "
                f"{type(error).__name__}: {error}"
            ) from error
        pages = replace(pages, page_nbytes=int(nbytes.sum()))
    return pages


@dataclass(frozen=True)
class PoolVerdict:
    """What one side pool says of the first ``pages`` pages of a sequence."""

    covered: int
    """Longest prefix in pages that the pool has what it needs for; 0: none."""
    restorable: Bools | None
    """bool[pages]: element i for a prefix of i + 1 pages; None: the pool does not decide."""


def verdict(policy: str, found: Bools, *, trailing: int = 1, block_pages: int = 0, group_pages: int = 0) -> PoolVerdict:
    """By the hit policy of a side pool, for which prefixes it has its pages.

    Args:
        policy: ``all_pages``: every page of the prefix. ``trailing_pages``: the last ``trailing`` pages of the prefix,
            or all where it is shorter. ``block_groups``: nothing is decided; covered are the leading blocks of
            ``block_pages`` pages whose last ``group_pages`` pages are all there, a block's last pages being the first
            ones that name all of its tokens.
        found: bool[pages], whether the pool has this page.
        trailing: see there.
        block_pages: see there.
        group_pages: see there.

    Raises:
        EngineContractError: another policy.
    """
    pages = len(found)
    if policy == ALL_PAGES:
        covered = leading(found)
        return PoolVerdict(covered, np.arange(pages) < covered)
    if policy == TRAILING_PAGES:
        at = np.arange(1, pages + 1)
        last_missing = np.maximum.accumulate(np.where(found, 0, at))
        restorable = at - last_missing >= np.minimum(max(1, trailing), at)
        ends = np.flatnonzero(restorable)
        return PoolVerdict(int(ends[-1]) + 1 if len(ends) else 0, restorable)
    if policy == BLOCK_GROUPS:
        if not 0 < group_pages <= block_pages:
            return PoolVerdict(0, None)
        blocks = found[: pages // block_pages * block_pages].reshape(-1, block_pages)
        whole = np.all(blocks[:, -group_pages:], axis=1)
        return PoolVerdict(leading(whole) * block_pages, None)
    raise EngineContractError(f"SGLang asks by a hit policy that is not known here: {policy}")


def leading(found: Bools) -> int:
    """How many elements from the first on are true."""
    missing = np.flatnonzero(~found)
    return int(missing[0]) if len(missing) else len(found)


def flat_addresses(tensors: Sequence[Any]) -> tuple[Int64s, Int64s]:
    """Addresses int64 (N, 1) and lengths in bytes int64 (N, 1) of contiguous CPU tensors.

    EngineContractError for others.
    """
    for at, tensor in enumerate(tensors):
        if not (tensor.is_cpu and tensor.is_contiguous() and tensor.nbytes):
            raise EngineContractError(
                f"page {at} of {len(tensors)} has {tensor.nbytes} bytes on {tensor.device} with strides "
                f"{tuple(tensor.stride())}, which are no contiguous bytes on the CPU"
            )
    n = len(tensors)
    return (
        np.fromiter((tensor.data_ptr() for tensor in tensors), np.int64, n).reshape(n, 1),
        np.fromiter((tensor.nbytes for tensor in tensors), np.int64, n).reshape(n, 1),
    )
