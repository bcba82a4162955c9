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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import MXFP4, release_form
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.formats.dtypes import E2M1_VALUES
from dsv4q.layout import DTYPE_BYTES, Dims, Role, TensorSpec, source_tensors

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

_MXFP4, _FP8, _NORMAL, _EXPERTS = "mxfp4", "fp8", "normal", "experts"
_GROUP, _BAND = 32, 128
_MOST = {_MXFP4: 1 << 25}
_USUAL = 1 << 22
"""Elements of a pool at most, where a model's tensors are large: 64 MiB of experts, 8 MiB of other BF16."""
_LEAST = 1 << 20
_TABLE_ROWS = 1 << 13
"""Rows of the pool of hash tables."""


@dataclass(frozen=True)
class Kind:
    """Where the values of a tensor come from; tensors of one kind share a pool."""

    name: str
    dtype: str
    scale: float = 1.0
    """Standard deviation, or the power of two next to it; of hash tables the number of experts."""
    mean: float = 0.0
    width: int = 1
    """Elements that belong together: a piece begins and ends between two such groups."""


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
        import numpy as np

        there = np.frombuffer(buffer, dtype=np.uint8)
        for extent in self.extents(name):
            begin, end = max(extent.start, start), min(extent.start + extent.nbytes, start + len(there))
            if begin < end:
                at = extent.offset + begin - extent.start
                # NumPy lets other threads run while it copies.
                there[begin - start : end - start] = self.pool(extent.kind)[at : at + end - begin]

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
        kind = self._kinds[name]
        unit = kind.width * DTYPE_BYTES[kind.dtype]
        most = min(PIECE, -(-entry.nbytes // PIECES), self._pool_bytes(kind) // 2)
        longest = max(unit, most // unit * unit)
        band = entry.shape[1] * _BAND * DTYPE_BYTES[kind.dtype] if kind.name == _FP8 else entry.nbytes
        for number, first in enumerate(range(0, entry.nbytes, band)):
            end = min(first + band, entry.nbytes)
            shift = (digest >> number % 32) % 3 if kind.name == _FP8 else 0
            made = Kind(kind.name, kind.dtype, kind.scale * 2.0**-shift) if shift else kind
            for start in range(first, end, longest):
                yield start, min(longest, end - start), made

    # ------------------------------------------------------------------------------------------------ pools

    @cached_property
    def _kinds(self) -> dict[str, Kind]:
        experts = int(self.config["n_routed_experts"])
        return {name: kind_of(spec, experts) for name, spec in self.specs.items()}

    @cached_property
    def _every_kind(self) -> tuple[Kind, ...]:
        return tuple({extent.kind: None for name in self.specs for extent in self.extents(name)})

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(self._pool_bytes(kind) for kind in self._every_kind)

    def make_pools(self) -> None:
        """Make every pool now instead of when it is first read."""
        for kind in self._every_kind:
            self.pool(kind)

    def pool(self, kind: Kind) -> np.ndarray[Any, Any]:
        """The bytes of a pool, U8."""
        found = self._pools.host.get(kind)
        if found is None:
            with self._pools.lock:
                if kind not in self._pools.host:
                    self._pools.host[kind] = _make(kind, self._pool_bytes(kind) // DTYPE_BYTES[kind.dtype], self.seed)
                found = self._pools.host[kind]
        return found

    def _pool_on(self, kind: Kind, device: torch.device) -> torch.Tensor:
        import torch

        with self._pools.lock:
            key = (kind, str(device))
            if key not in self._pools.devices:
                self._pools.devices[key] = torch.from_numpy(self.pool(kind)).to(device)
            return self._pools.devices[key]

    def _pool_bytes(self, kind: Kind) -> int:
        if kind.name == _EXPERTS:
            return _TABLE_ROWS * kind.width * DTYPE_BYTES[kind.dtype]
        return min(self.elements, _MOST.get(kind.name, _USUAL)) * DTYPE_BYTES[kind.dtype]


def kind_of(spec: TensorSpec, experts: int) -> Kind:
    """Which values a tensor has. What the release stores as MXFP4 or FP8 lies on that grid."""
    if spec.name.endswith("tid2eid"):
        return Kind(_EXPERTS, spec.dtype, scale=experts, width=spec.shape[1])
    form = release_form(spec)
    if form is not None:
        scale = 2.0 ** round(-math.log2(spec.shape[1]) / 2)
        name, width = (_MXFP4, _GROUP) if form == MXFP4 else (_FP8, 1)
        return Kind(name, spec.dtype, scale, width=width)
    mean, deviation = moments(spec)
    return Kind(_NORMAL, spec.dtype, deviation, mean)


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


# ------------------------------------------------------------------------------------------------ values


def _make(kind: Kind, count: int, seed: int) -> np.ndarray[Any, Any]:
    """The pool of a kind: `count` elements, as U8. A function of seed and kind alone."""
    import numpy as np

    key = hashlib.blake2b(f"{seed}:{kind}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    if kind.name == _MXFP4:
        return _mxfp4(kind, count, rng).view(np.uint8)
    if kind.name == _FP8:
        return _fp8(kind, count, rng).view(np.uint8)
    if kind.name == _EXPERTS:
        order = rng.random((count // kind.width, int(kind.scale)), dtype=np.float32).argsort(axis=1, kind="stable")
        return order[:, : kind.width].astype(np.int64, order="C").reshape(-1).view(np.uint8)
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(kind.scale) + np.float32(kind.mean)
    return (_bf16(values) if kind.dtype == "BF16" else values).view(np.uint8)


def _mxfp4(kind: Kind, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """BF16 as U16: Gaussian quantiles rounded to E2M1, times a power of two for each group of 32."""
    import numpy as np

    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    grid = np.array(E2M1_VALUES[:8])
    codes = np.abs(np.abs(quantiles[:, None]) * 6 / quantiles[-1] - grid).argmin(axis=1)
    values = np.copysign(grid[codes], quantiles)
    # Their deviation is about 2.2, and that of the four factors 0.6.
    table = _bf16((kind.scale * 2.0 ** -np.arange(4.0)[:, None] * values).astype(np.float32))
    pool = np.empty((count // _GROUP, _GROUP), dtype=np.uint16)
    for rows in np.array_split(pool, max(1, count >> 20)):
        factor = rng.integers(0, 4, (len(rows), 1), dtype=np.uint8)
        rows[:] = table[factor, rng.integers(0, 256, rows.shape, dtype=np.uint8)]
    return pool.reshape(-1)


def _fp8(kind: Kind, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """BF16 as U16: Gaussian quantiles rounded to E4M3, times one power of two."""
    import numpy as np
    import torch

    normal = NormalDist(sigma=64)  # of 65,536 quantiles the last is at 4.2 deviations: 448 is not reached
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    table = _bf16(quantiles.to(torch.float8_e4m3fn).to(torch.float32).numpy() * np.float32(kind.scale / 64))
    return table[rng.integers(0, 65536, count, dtype=np.uint16)]


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """U16 bit patterns of finite F32 values as BF16, ties to even."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
