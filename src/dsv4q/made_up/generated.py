"""A checkpoint that is not there: its weights are made up as they are read, at the speed of a copy out of memory.

It stands in for a source in the page cache, so reading it must cost no more. A few pools of values are made once; a
tensor is cut into pieces, and each piece is a stretch of a pool whose place follows from a digest of seed and name. So
a tensor is a function of seed, name and dimensions alone, whoever reads it, in which order, on how many threads.

| tensors | values |
|---|---|
| routed experts | MXFP4's grid: E2M1 times 2^k, one k per 32 columns |
| attention, shared experts, `indexer.wq_b`, `e_proj`, `h_proj` | FP8's grid: E4M3 times 2^k, one k per 128 rows |
| other BF16 and F32 | Gaussian |
| `tid2eid` | distinct experts in each row |

Linears keep about the variance of their input, norms are near 1, hyper-connections mix all streams, so that the
residual streams of many layers stay finite.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import MXFP4, release_form
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.layout import DTYPE_BYTES, Dims, Role, TensorSpec, source_tensors
from dsv4q.made_up.pools import FP8_GRID, GROUP, HASH_TABLE, MXFP4_GRID, NORMAL, Kind, make_pool

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT = 1
"""Part of the fingerprint: another way to make values has another number."""
FILE = "generated"
"""What stands where errors name a tensor's file."""

PIECE = 2 << 20
"""Longest piece, in bytes: a pool is much longer, and a copy is much slower than finding its place."""
PIECES = 4
"""Pieces of a small tensor at least, so that two tensors do not come out equal by chance."""

_BAND = 128
_MOST = {MXFP4_GRID: 1 << 25}
_USUAL = 1 << 22
"""Elements of a pool at most, where a model's tensors are large: 64 MiB of experts, 8 MiB of other BF16."""
_LEAST = 1 << 20
_TABLE_ROWS = 1 << 13
"""Rows of the pool of hash tables."""


@dataclass(frozen=True)
class Extent:
    """A piece of a tensor."""

    start: int
    """In the tensor, in bytes."""
    nbytes: int
    kind: Kind
    offset: int
    """In the pool, in bytes."""


@dataclass
class _Pools:
    """The pools that were needed so far, on the host and on devices."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    host: dict[Kind, np.ndarray[Any, Any]] = field(default_factory=dict)
    """U8 [bytes] each."""
    devices: dict[tuple[Kind, str], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GeneratedCheckpoint(Checkpoint):
    """A BF16 checkpoint whose tensors are made up. Reading is safe from several threads."""

    seed: int
    specs: dict[str, TensorSpec]
    elements: int
    """Length of the experts' pool in elements; of the others at most."""
    _pools: _Pools = field(default_factory=_Pools, repr=False, compare=False)

    @classmethod
    def of(cls, config: dict[str, Any], where: Path, seed: int = 0) -> GeneratedCheckpoint:
        """The checkpoint that a parsed config.json describes.

        Args:
            where: the config.json, or the folder that has it.

        Raises:
            SourceError: not the config.json of a DeepSeek-V4.
        """
        file = where / "config.json" if where.is_dir() else where
        specs = {spec.name: spec for spec in source_tensors(Dims.from_config(config, file))}
        largest = max(math.prod(spec.shape) for spec in specs.values() if spec.role == Role.ROUTED_EXPERT)
        return cls(
            root=file.parent,
            config=config,
            tensors={n: TensorEntry(n, FILE, s.dtype, s.shape, 0, s.nbytes) for n, s in specs.items()},
            files={},
            problems=(),
            has_weights=True,
            config_file=file,
            seed=seed,
            specs=specs,
            elements=max(_LEAST, 1 << (4 * largest - 1).bit_length()),
        )

    def read_part(self, name: str, start: int, buffer: memoryview) -> None:
        """Write those bytes of a tensor into `buffer` that begin at byte `start` of it."""
        copy_part(self.extents(name), self.pool, start, buffer)

    def fetched(self, name: str, *, pinned: bool = False) -> Callable[[torch.Tensor], None]:
        """See `Checkpoint.fetched`; there is nothing to read, values are copied on the device itself."""
        return partial(self.copy_to, name)

    def copy_to(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor's values into `tensor`, contiguous and of its dtype and shape, on any device."""
        import torch

        flat = tensor.reshape(-1).view(torch.uint8)
        for extent in self.extents(name):
            values = self._pool_on(extent.kind, tensor.device)[extent.offset : extent.offset + extent.nbytes]
            flat[extent.start : extent.start + extent.nbytes].copy_(values)

    def read_many(self, wanted: Sequence[tuple[str, memoryview]]) -> None:
        """See `Checkpoint.read_many`; nothing lies side by side."""
        for name, buffer in wanted:
            self.read_into(name, buffer)

    def is_whole(self, name: str) -> bool:
        """What is made up is."""
        return name in self.tensors

    def fingerprint(self) -> dict[str, Any]:
        """What decides every byte, as JSON."""
        text = json.dumps(self.config, sort_keys=True).encode()
        return {"generated": FORMAT, "seed": self.seed, "config_sha256": hashlib.sha256(text).hexdigest()}

    def close(self) -> None:
        """Nothing is open."""

    def extents(self, name: str) -> Iterator[Extent]:
        """The pieces of a tensor, in order."""
        entry = self._entry(name)
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=16).digest()
        place, step = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1
        for start, nbytes, kind in self._pieces(name, entry, place):
            unit = kind.width * DTYPE_BYTES[kind.dtype]
            slots = (self._pool_bytes(kind) - nbytes) // unit + 1
            yield Extent(start, nbytes, kind, (place * slots >> 64) * unit)
            place = (place + step) % (1 << 64)

    def _pieces(self, name: str, entry: TensorEntry, digest: int) -> Iterator[tuple[int, int, Kind]]:
        """(first byte, bytes, kind) of each piece; of FP8 every band of 128 rows has a scale of its own."""
        kind = self.kinds[name]
        unit = kind.width * DTYPE_BYTES[kind.dtype]
        most = min(PIECE, -(-entry.nbytes // PIECES), self._pool_bytes(kind) // 2)
        longest = max(unit, most // unit * unit)
        band = entry.shape[1] * _BAND * DTYPE_BYTES[kind.dtype] if kind.name == FP8_GRID else entry.nbytes
        for number, first in enumerate(range(0, entry.nbytes, band)):
            end = min(first + band, entry.nbytes)
            shift = (digest >> number % 32) % 3 if kind.name == FP8_GRID else 0
            made = Kind(kind.name, kind.dtype, kind.scale * 2.0**-shift) if shift else kind
            for start in range(first, end, longest):
                yield start, min(longest, end - start), made

    # ------------------------------------------------------------------------------------------------ pools

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The kind of each tensor; bands of an FP8 one may have smaller scales."""
        experts = int(self.config["n_routed_experts"])
        return {name: kind_of(spec, experts, self.expert_dtype) for name, spec in self.specs.items()}

    @property
    def expert_dtype(self) -> str:
        """`fp4` or `fp8`, as in the release's config.json and Base's: on whose grid the routed experts lie."""
        return str(self.config.get("expert_dtype", "fp4"))

    @cached_property
    def every_kind(self) -> tuple[Kind, ...]:
        """Kinds of all pools."""
        # Only of an FP8 tensor the pieces are of several kinds; looking at those of all would take a second.
        on_fp8 = [name for name, kind in self.kinds.items() if kind.name == FP8_GRID]
        others = dict.fromkeys(kind for kind in self.kinds.values() if kind.name != FP8_GRID)
        return tuple(others | {extent.kind: None for name in on_fp8 for extent in self.extents(name)})

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return self.bytes_of(self.every_kind)

    def bytes_of(self, kinds: Iterable[Kind]) -> int:
        """Bytes of these pools."""
        return sum(self._pool_bytes(kind) for kind in kinds)

    def pool(self, kind: Kind) -> np.ndarray[Any, Any]:
        """The bytes of a pool, U8; made when they are first read."""
        found = self._pools.host.get(kind)
        if found is None:
            with self._pools.lock:
                if kind not in self._pools.host:
                    self._pools.host[kind] = make_pool(kind, self.pool_length(kind), self.seed)
                found = self._pools.host[kind]
        return found

    def _pool_on(self, kind: Kind, device: torch.device) -> torch.Tensor:
        import torch

        with self._pools.lock:
            key = (kind, str(device))
            if key not in self._pools.devices:
                self._pools.devices[key] = torch.from_numpy(self.pool(kind)).to(device)
            return self._pools.devices[key]

    def pool_length(self, kind: Kind) -> int:
        """Elements of a pool."""
        return self._pool_bytes(kind) // DTYPE_BYTES[kind.dtype]

    def _pool_bytes(self, kind: Kind) -> int:
        if kind.name == HASH_TABLE:
            return _TABLE_ROWS * kind.width * DTYPE_BYTES[kind.dtype]
        return min(self.elements, _MOST.get(kind.name, _USUAL)) * DTYPE_BYTES[kind.dtype]


def copy_part(
    extents: Iterable[Extent], pool: Callable[[Kind], np.ndarray[Any, Any]], start: int, buffer: memoryview
) -> None:
    """Write those bytes of a tensor of these extents into `buffer` that begin at byte `start` of it."""
    import numpy as np

    there = np.frombuffer(buffer, dtype=np.uint8)
    for extent in extents:
        begin, end = max(extent.start, start), min(extent.start + extent.nbytes, start + len(there))
        if begin < end:
            at = extent.offset + begin - extent.start
            # NumPy lets other threads run while it copies.
            there[begin - start : end - start] = pool(extent.kind)[at : at + end - begin]


def kind_of(spec: TensorSpec, experts: int, expert_dtype: str = "fp4") -> Kind:
    """Which values a tensor has. What the release stores as MXFP4 or FP8 lies on that grid; see `release_form`."""
    if spec.name.endswith("tid2eid"):
        return Kind(HASH_TABLE, spec.dtype, scale=experts, width=spec.shape[1])
    form = release_form(spec, expert_dtype)
    if form is not None:
        scale = 2.0 ** round(-math.log2(spec.shape[1]) / 2)
        name, width = (MXFP4_GRID, GROUP) if form == MXFP4 else (FP8_GRID, 1)
        return Kind(name, spec.dtype, scale, width=width)
    mean, deviation = moments(spec)
    return Kind(NORMAL, spec.dtype, deviation, mean)


def moments(spec: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation of a made-up tensor, so that many blocks stay finite."""
    if spec.role == Role.EMBEDDING:
        return 0.0, 1.0
    if spec.name.endswith("norm.weight"):
        return 1.0, 0.1
    if spec.name.endswith("_scale"):
        return 0.5, 0.1
    if spec.name.endswith("gate.bias"):
        return 0.0, 0.05
    if len(spec.shape) == 1 or spec.name.endswith(".ape"):
        return 0.0, 0.5
    return 0.0, 1 / math.sqrt(spec.shape[-1])
