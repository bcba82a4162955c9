"""Planned shards: which tensors one holds, its exact header, and where in it each tensor lies.

Names, dtypes and shapes are known before the first byte, so the header is written first and tensors come in any order.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsv4q.errors import ConfigError
from dsv4q.layout import DTYPE_BYTES, Shape, TensorSpec


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the artifact."""

    name: str
    dtype: str
    shape: Shape
    spec: TensorSpec
    """The source tensor it is made of."""
    encoded: bool
    """False: the source's bytes. True: made by compressing the module `spec.module`."""
    block: str
    """Unit of work that writes it."""

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class PlannedShard:
    """One safetensors file: its exact header and the offset of every tensor in it."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    """In the order in which they lie in the file: by alignment, then by the model's order."""

    @classmethod
    def of(cls, file: str, tensors: Iterable[PlannedTensor]) -> PlannedShard:
        """A shard of `tensors`, which come in the model's order."""
        # Wide dtypes first keeps every tensor aligned to its element size, as safetensors' own writer does.
        return cls(file, tuple(sorted(tensors, key=lambda t: -DTYPE_BYTES[t.dtype])))

    @cached_property
    def data_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def header(self) -> bytes:
        """8 bytes of length and the JSON, padded with spaces to a multiple of 8."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes

    def offsets(self) -> Iterator[tuple[PlannedTensor, int]]:
        """Tensors with their absolute offset in the file."""
        offset = len(self.header)
        for tensor in self.tensors:
            yield tensor, offset
            offset += tensor.nbytes


@dataclass(frozen=True)
class ShardPlan:
    """What is written, to which file, and where in it."""

    shards: tuple[PlannedShard, ...]

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(t for shard in self.shards for t in shard.tensors)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Units of work in order."""
        return tuple(sorted(self._by_block, key=block_order))

    def block_tensors(self, block: str) -> tuple[PlannedTensor, ...]:
        return self._by_block.get(block, ())

    @cached_property
    def _by_block(self) -> dict[str, tuple[PlannedTensor, ...]]:
        found: dict[str, list[PlannedTensor]] = defaultdict(list)
        for tensor in self.tensors:
            found[tensor.block].append(tensor)
        return {block: tuple(tensors) for block, tensors in found.items()}

    @property
    def artifact_bytes(self) -> int:
        """Bytes of tensor data, the index's `total_size`."""
        return sum(s.data_bytes for s in self.shards)

    def index(self) -> dict[str, Any]:
        """Contents of model.safetensors.index.json."""
        weight_map = {t.name: shard.file for shard in self.shards for t in shard.tensors}
        return {"metadata": {"total_size": self.artifact_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def blocks_of(shard: PlannedShard) -> list[str]:
    return sorted({t.block for t in shard.tensors}, key=block_order)


def block_order(block: str) -> tuple[int, int]:
    kind, _, number = block.partition(".")
    return ("embed", "layers", "head", "mtp").index(kind), int(number or 0)


def balanced_shards(
    tensors: list[PlannedTensor], count: int, asked_by: str = "output.shards"
) -> tuple[PlannedShard, ...]:
    """Cut the model's order into exactly `count` contiguous shards as equal as whole pieces allow.

    A piece is one routed expert or one other module; it is never cut. Each cut is the piece boundary nearest to
    its ideal place, k/count of all bytes.
    """
    pieces: list[list[PlannedTensor]] = []
    key = None
    for tensor in tensors:
        this = (tensor.block, tensor.spec.expert if tensor.spec.expert is not None else tensor.name.rpartition(".")[0])
        if this != key:
            pieces.append([])
        pieces[-1].append(tensor)
        key = this
    if count > len(pieces):
        raise ConfigError(
            "More shards are asked for than there are pieces to put into them",
            where=asked_by,
            expected=f"at most {len(pieces)}",
            found=count,
        )
    ends = _cuts([sum(t.nbytes for t in piece) for piece in pieces], count)
    shards = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        members = [tensor for piece in pieces[start:end] for tensor in piece]
        shards.append(PlannedShard.of(shard_name(number, count), members))
    return tuple(shards)


def shard_name(number: int, count: int) -> str:
    """Name of shard `number`, from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _cuts(sizes: list[int], count: int) -> list[int]:
    """End index of each of `count` contiguous parts of `sizes`, none empty."""
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    ends: list[int] = []
    for k in range(1, count):
        ideal = sums[-1] * k / count
        at = bisect_left(sums, ideal)
        if at > 0 and ideal - sums[at - 1] <= sums[at] - ideal:
            at -= 1
        least = (ends[-1] if ends else 0) + 1
        most = len(sizes) - (count - k)
        ends.append(min(max(at, least), most))
    return [*ends, len(sizes)]


def index_text(plan: ShardPlan) -> str:
    """model.safetensors.index.json of the artifact."""
    return json.dumps(plan.index(), indent=2) + "\n"
