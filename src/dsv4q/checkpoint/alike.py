"""Tensors that lie alike in the files: a call for many of them is worth more than many calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import entries_of
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.layout import DTYPE_BYTES, Shape

T = TypeVar("T")


def stored_kind(checkpoint: Checkpoint, name: str) -> tuple[tuple[str, Shape], ...]:
    """Dtypes and shapes of what lies in the files of one logical tensor: tensors of one kind can be read together."""
    return tuple((entry.dtype, entry.shape) for entry in entries_of(checkpoint, name))


def stored_alike(
    items: Iterable[T], kind: Callable[[T], Hashable], nbytes: Callable[[T], int], limit: int
) -> list[tuple[tuple[T, ...], int]]:
    """Items of one kind together, in the order in which kinds come, as many at a time as `limit` allows.

    Args:
        kind: says what makes them alike, their size too.
        nbytes: of one item.
        limit: bytes of those that go together; one is always allowed.

    Returns:
        The items, and their bytes in all.
    """
    by_kind: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        by_kind[kind(item)].append(item)
    found = []
    for alike in by_kind.values():
        size = nbytes(alike[0])
        step = max(1, limit // max(1, size))
        parts = (tuple(alike[i : i + step]) for i in range(0, len(alike), step))
        found += [(part, len(part) * size) for part in parts]
    return found


def packed_alike(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[TensorEntry, ...] | None:
    """Weight and scale of the first of these weights if all are packed and lie alike in the files; else None."""
    found = [entries_of(checkpoint, name) for name in names]
    kinds = {tuple((DTYPE_BYTES[entry.dtype], entry.shape) for entry in entries) for entries in found}
    return found[0] if len(kinds) == 1 and len(found[0]) == 2 else None
