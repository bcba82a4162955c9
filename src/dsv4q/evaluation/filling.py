"""Blocks brought into memory, one in use while the next one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dsv4q.checkpoint.pipes import BUDGET, loaded_ahead
from dsv4q.evaluation.pieces import Piece
from dsv4q.evaluation.side import Side

Fill = Callable[[Side, str], None]
"""Brings a block into memory."""

_GPU_BUDGET, _GPU_THREADS = 4 << 30, 8


def main_blocks(side: Side) -> list[str]:
    """The blocks that a text goes through before the head."""
    return ["embed", *(f"layers.{index}" for index in range(side.dims.layers))]


@contextmanager
def filling(order: Sequence[tuple[Side, str]], note: Callable[[str, int], None]) -> Iterator[Fill]:
    """A function that brings a block into memory; blocks are asked for in this order, and read ahead.

    Args:
        note: told what comes and its bytes on disk; may raise.
    """
    on_gpu = order[0][0].device.type == "cuda"
    blocks = [side.pieces(block) for side, block in order]
    largest = max(sum(piece.nbytes for piece in pieces) for pieces in blocks)
    with loaded_ahead(
        [piece for pieces in blocks for piece in pieces],
        Piece.load,
        lambda piece: piece.nbytes,
        budget=min(largest, _GPU_BUDGET if on_gpu else BUDGET),
        threads=_GPU_THREADS if on_gpu else 1,
    ) as loaded:

        def fill(side: Side, block: str) -> None:
            for wanted in side.pieces(block):
                piece, tensors = next(loaded)
                assert piece is wanted, f"{piece.tensors[0].spec.name} comes"
                side.install(piece, tensors)
                note(f"{side.name} {block}", piece.nbytes)
            side.emulate_inputs(block)

        yield fill
