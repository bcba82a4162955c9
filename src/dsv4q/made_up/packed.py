"""A made-up checkpoint as DeepSeek publishes one: the same values as codes and scales, cut from pools of those.

`GeneratedCheckpoint` is its dequantization, bit for bit; which pieces a tensor is made of is decided there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import MXFP4, release_form
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import UsageError
from dsv4q.layout import TensorSpec
from dsv4q.made_up.generated import FILE, Extent, GeneratedCheckpoint, copy_part
from dsv4q.made_up.native import stored_specs
from dsv4q.made_up.pools import FP8_GRID, GROUP, MXFP4_GRID, Kind, make_packed_pool

if TYPE_CHECKING:
    import numpy as np

_CODES, _SCALES = 0, 1
_TIMES = {(MXFP4_GRID, _CODES): 4, (MXFP4_GRID, _SCALES): 2 * GROUP, (FP8_GRID, _CODES): 2}
"""How many times as long the BF16 bytes are."""


@dataclass
class _PackedPools:
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: dict[Kind, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PackedCheckpoint(Checkpoint):
    """The tensors of a native checkpoint as they would lie in its files. Reading is safe from several threads."""

    plain: GeneratedCheckpoint
    """What it stands for."""
    origins: dict[str, tuple[TensorSpec, int]]
    """Stored tensor -> the tensor of the model that it belongs to, and whether it has its codes or its scales."""
    _pools: _PackedPools = field(default_factory=_PackedPools, repr=False, compare=False)

    @classmethod
    def of(cls, plain: GeneratedCheckpoint) -> PackedCheckpoint:
        """The native checkpoint whose dequantization is `plain`.

        Raises:
            UsageError: rows of experts that do not end with a group of 32, whose scales such pools do not have.
        """
        ragged = next((s for s in plain.specs.values() if _form(plain, s) == MXFP4 and s.shape[1] % GROUP), None)
        if ragged is not None:
            raise UsageError(
                "These weights cannot be made up in the native layout",
                where=f"{plain.config_file}: {ragged.name}",
                expected=f"rows of a multiple of {GROUP} weights",
                found=list(ragged.shape),
                hint="rehearse it without --native",
            )
        parts = {spec.name: stored_specs(spec, plain.expert_dtype) for spec in plain.specs.values()}
        stored = [part for both in parts.values() for part in both]
        return cls(
            root=plain.root,
            config=plain.config,
            tensors={s.name: TensorEntry(s.name, FILE, s.dtype, s.shape, 0, s.nbytes) for s in stored},
            files={},
            problems=(),
            has_weights=True,
            config_file=plain.config_file,
            plain=plain,
            origins={p.name: (plain.specs[name], i) for name, both in parts.items() for i, p in enumerate(both)},
        )

    def read_part(self, name: str, start: int, buffer: memoryview) -> None:
        """Write those bytes of a stored tensor into `buffer` that begin at byte `start` of it."""
        entry = self._entry(name)
        spec, part = self.origins[name]
        if _form(self.plain, spec) is None:
            self.plain.read_part(name, start, buffer)
        elif (self.plain.kinds[spec.name].name, part) in _TIMES:
            copy_part(self._extents(spec, part), lambda kind: self._pool(kind)[part], start, buffer)
        else:
            buffer[:] = self._block_scales(spec, entry)[start : start + len(buffer)]

    def read_many(self, wanted: Sequence[tuple[str, memoryview]]) -> None:
        """See `Checkpoint.read_many`; nothing lies side by side."""
        for name, buffer in wanted:
            self.read_into(name, buffer)

    def is_whole(self, name: str) -> bool:
        """What is made up is."""
        return name in self.tensors

    def fingerprint(self) -> dict[str, Any]:
        """What decides every byte, as JSON."""
        return self.plain.fingerprint() | {"native": True}

    def close(self) -> None:
        """Nothing is open."""

    def _extents(self, spec: TensorSpec, part: int) -> list[Extent]:
        """The pieces of the codes, or of MXFP4's scales: those of the BF16 tensor, so many times as short."""
        extents = list(self.plain.extents(spec.name))
        n = _TIMES[self.plain.kinds[spec.name].name, part]
        return [Extent(e.start // n, e.nbytes // n, e.kind, e.offset // n) for e in extents]

    def _block_scales(self, spec: TensorSpec, entry: TensorEntry) -> bytes:
        """Scales of an FP8 tensor: one for each band of 128 rows, of E8M0 or F32."""
        import numpy as np

        bands, columns = entry.shape
        extents = list(self.plain.extents(spec.name))
        band = 2 * spec.shape[1] * 128
        kinds = {extent.start // band: extent.kind for extent in extents}
        codes = np.repeat([self._pool(kinds[i])[_SCALES][0] for i in range(bands)], columns)
        # E8M0 is F32's exponent field.
        return (codes if entry.dtype == "F8_E8M0" else codes.astype("<u4") << 23).tobytes()

    # ------------------------------------------------------------------------------------------------ pools

    @cached_property
    def _every_kind(self) -> tuple[Sequence[Kind], Sequence[Kind]]:
        """Kinds of pools of codes and scales, and those of tensors that are no different here."""
        packed = [kind for kind in self.plain.every_kind if kind.name in (MXFP4_GRID, FP8_GRID)]
        return packed, [kind for kind in self.plain.every_kind if kind not in packed]

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        packed, others = self._every_kind
        bits = {MXFP4_GRID: 4 + 8 / GROUP, FP8_GRID: 8}
        return sum(int(self.plain.pool_length(k) * bits[k.name] / 8) for k in packed) + self.plain.bytes_of(others)

    def _pool(self, kind: Kind) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        found = self._pools.made.get(kind)
        if found is None:
            with self._pools.lock:
                if kind not in self._pools.made:
                    self._pools.made[kind] = make_packed_pool(kind, self.plain.pool_length(kind), self.plain.seed)
                found = self._pools.made[kind]
        return found


def _form(plain: GeneratedCheckpoint, spec: TensorSpec) -> str | None:
    return release_form(spec, plain.expert_dtype)
