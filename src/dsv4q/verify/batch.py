"""Many linears at once: whatever decodes to its source bit for bit needs no closer look.

Of a native source codes are compared with codes (`packed.py`), of another one numbers with numbers. A GPU takes a batch
as one stack; on a CPU a thread goes through its linears, in tiles that stay in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dsv4q.checkpoint.native import MXFP4, NativeCheckpoint, entries_of
from dsv4q.checkpoint.source import stacked
from dsv4q.errors import SourceError, WeightError
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.formats.error import TensorError
from dsv4q.layout import Shape, TensorSpec
from dsv4q.verify.case import BATCH_BYTES, PACKED_BATCH_BYTES, Case
from dsv4q.verify.linear import HOST_PASSES, Linear, bytes_on_disk, bytes_stored
from dsv4q.verify.packed import equal_fp8, equal_mxfp4
from dsv4q.verify.schemes import FP8, NVFP4, StoredScheme

TILE = 1 << 18
"""Elements that a CPU compares at once."""
_BAND = 128
"""Rows of a tile come in multiples of this, so that no block of a scale is cut."""


class LinearBatch:
    """Linears of one shape and scheme with a source, judged together while they are as they should be.

    Whichever is not exact gets a judge of its own, which tells a defect from what a recipe rounds. Of one that is exact
    that would find nothing: its codes are those that its source has under its scales, and the bounds are about errors.

    Args:
        specs: alike in the source too.
        quick: leave exact ones out of the statistics.
    """

    def __init__(self, case: Case, scheme: StoredScheme, specs: tuple[TensorSpec, ...], *, quick: bool) -> None:
        self.case, self.scheme, self.specs, self.quick = case, scheme, specs, quick
        self.label = specs[0].block
        self.suffixes = tuple(scheme.stored(specs[0].shape))
        self.size = bytes_stored(case, specs)
        self.read = self.size + bytes_on_disk(case, specs)
        self.on_host = case.device is not None and case.device.type == "cpu"
        self.memory = HOST_PASSES * specs[0].nbytes if self.on_host else self.read
        self.pieces: list[_Piece] = []
        self.good: list[bool] = []
        self.powers: list[bool] = []
        self.closer: list[Linear] = []
        """Judged one by one."""

    def load(self) -> None:
        """From the disk to the host; there, judge too."""
        step = 1 if self.on_host else len(self.specs)
        memory: dict[object, Tensor] = {}
        for start in range(0, len(self.specs), step):
            some = self.specs[start : start + step]
            piece = _Piece(self.case, self.scheme, some, memory if self.on_host else {}, pinned=not self.on_host)
            if self.on_host:
                self._judge(piece)
            else:
                self.pieces.append(piece)
        if self.on_host:
            self._look_closer()

    def judge(self) -> None:
        if not self.on_host:
            for piece in self.pieces:
                self._judge(piece)
            self.pieces.clear()
            self._look_closer()
        scales = sum(suffix.endswith("scale") for suffix in self.suffixes)
        for spec, fine, power in zip(self.specs, self.good, self.powers, strict=True):
            if fine:
                self._is_exact(spec, scales, power)
        for linear in self.closer:
            linear.judge()

    def _judge(self, piece: _Piece) -> None:
        good, powers = piece.compared()
        self.good += good
        self.powers += powers

    def _look_closer(self) -> None:
        if not any(self.good):
            self.case.rounded.add(self.scheme.group)
        self.closer = [
            Linear(self.case, spec, self.scheme, {}, {})
            for spec, fine in zip(self.specs, self.good, strict=True)
            if not fine
        ]
        for linear in self.closer:
            linear.load()

    def _is_exact(self, spec: TensorSpec, scales: int, power: bool) -> None:
        """Count what was looked at, as a judge of its own would have."""
        case = self.case
        case.log.looked_at("scales", scales)
        if self.quick:
            case.log.looked_at("exact")
            case.exact[spec.class_name] += 1
            return
        case.log.looked_at("values", len(self.scheme.value_tensors(self.suffixes)) if case.deep else 0)
        case.log.looked_at("encoding")
        case.log.looked_at("error")
        errors = case.errors[spec.class_name]
        errors.add(spec.module, TensorError(1.0, 0.0, 0.0, 0.0))
        errors.power_of_two_scales += power


class _Piece:
    """Linears that lie in memory together, as stacks [T, ...] of each tensor; made by reading them.

    What cannot be read or decoded is not shown to be as it must be; a judge of its own says why.

    Args:
        memory: of the piece before, which is not wanted any more: fresh memory costs as much as reading into it.
    """

    def __init__(
        self,
        case: Case,
        scheme: StoredScheme,
        specs: Sequence[TensorSpec],
        memory: dict[object, Tensor],
        *,
        pinned: bool,
    ) -> None:
        self.memory = memory
        self.case, self.scheme, self.specs = case, scheme, specs
        self.host: dict[str, Tensor] = {}
        self.packed: tuple[Tensor, ...] = ()
        """Of a native source what lies in its files, stacked too."""
        self.weights: list[Callable[[Tensor], None]] = []
        self.readable = True
        try:
            self._read(pinned=pinned)
        except (SourceError, WeightError):
            self.readable = False

    def _read(self, *, pinned: bool) -> None:
        case, scheme, specs, source = self.case, self.scheme, self.specs, self.case.source
        assert source is not None
        wanted: list[tuple[str, memoryview]] = []
        for suffix in scheme.stored(specs[0].shape):
            names = [f"{spec.module}.{suffix}" for spec in specs]
            header = case.sound[names[0]]
            self.host[suffix] = self._empty(suffix, header.dtype, header.shape, pinned=pinned)
            wanted += stacked(names, self.host[suffix])
        case.artifact.read_many(wanted)
        if is_packed(case, specs[0]):
            assert isinstance(source, NativeCheckpoint)
            parts = list(zip(*(entries_of(source, spec.name) for spec in specs), strict=True))
            self.packed = tuple(
                self._empty(number, part[0].dtype, part[0].shape, pinned=pinned) for number, part in enumerate(parts)
            )
            names_of = ([entry.name for entry in part] for part in parts)
            source.on_disk.read_many([p for pair in zip(names_of, self.packed, strict=True) for p in stacked(*pair)])
        else:
            self.weights = [source.fetched(spec.name, pinned=pinned) for spec in specs]

    def _empty(self, what: object, dtype: str, shape: Shape, *, pinned: bool) -> Tensor:
        """Memory for a stack [T, ...]."""
        if what not in self.memory:
            whole = (len(self.specs), *shape)
            self.memory[what] = torch.empty(whole, dtype=torch_dtypes()[dtype], pin_memory=pinned)
        return self.memory[what]

    def compared(self) -> tuple[list[bool], list[bool]]:
        """Which linears are shown to be as they must be, and which have nothing but powers of two for scales.

        What must be: they decode to the source bit for bit, which is finite, and every scale is positive and finite.
        """
        try:
            if self.readable:
                good, powers = torch.stack(self._compared()).tolist()
                return good, powers
        except WeightError:
            pass
        return [False] * len(self.specs), [False] * len(self.specs)

    def _compared(self) -> tuple[Tensor, Tensor]:
        """The same as Bool [T]."""
        device = self.case.device
        stored = {suffix: tensor.to(device, non_blocking=True) for suffix, tensor in self.host.items()}
        if self.packed:
            weight, scale = (part.to(device, non_blocking=True) for part in self.packed)
            if self.scheme.format == NVFP4:
                codes, scales = stored["weight_packed"], (stored["weight_scale"], stored["weight_global_scale"])
                fine = equal_mxfp4(weight, scale, codes, *scales)
            else:
                fine = equal_fp8(weight, scale, stored["weight"], stored["weight_scale"])
            return fine & self._usable(stored, "input_global_scale"), fine  # only powers of two are shown equal
        shape = (len(self.specs), *self.specs[0].shape)
        weights = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for row, write in zip(weights, self.weights, strict=True):
            write(row)
        powers = (torch.frexp(self.scheme.unit(stored).reshape(len(weights), -1)).mantissa == 0.5).all(dim=1)
        return self._equal_numbers(stored, weights) & self._usable(stored, "scale"), powers

    def _usable(self, stored: Mapping[str, Tensor], ending: str) -> Tensor:
        """Of which linears every scale of this ending is positive and finite; Bool [T]."""
        fine = torch.ones(len(self.specs), dtype=torch.bool, device=self.case.device)
        for suffix in (suffix for suffix in stored if suffix.endswith(ending)):
            number = self.scheme.numbers(stored[suffix])
            fine &= (number.isfinite() & (number > 0)).flatten(1).all(dim=1)
        return fine

    def _equal_numbers(self, stored: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        rows, columns = weights.shape[1:]
        step = rows if weights.is_cuda else max(1, TILE // columns // _BAND) * _BAND
        fine = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
        for start in range(0, rows, step):
            part = {suffix: self._rows(suffix, tensor, start, start + step) for suffix, tensor in stored.items()}
            decoded = self.scheme.decode(part)["weight"]
            same = decoded.view(torch.int32) == weights[:, start : start + step].to(torch.float32).view(torch.int32)
            # Equal NaN or Inf are not equal weights; a sum in F64 has them if one element has, and only then.
            fine &= same.flatten(1).all(dim=1) & decoded.flatten(1).sum(dim=1, dtype=torch.float64).isfinite()
        return fine

    def _rows(self, suffix: str, tensor: Tensor, start: int, end: int) -> Tensor:
        """Of a stored tensor what belongs to some rows of the weight; `start` is a multiple of `_BAND`."""
        if tensor.ndim < 3:
            return tensor
        height = _BAND if self.scheme.in_squares and suffix.endswith("scale") else 1
        return tensor[:, start // height : -(-end // height)]


def most_together(case: Case, spec: TensorSpec) -> int:
    """Of linears like this one how many are judged together, at most."""
    if is_packed(case, spec):
        return max(1, PACKED_BATCH_BYTES // (bytes_stored(case, [spec]) + bytes_on_disk(case, [spec])))
    return max(1, BATCH_BYTES // (2 * spec.nbytes))


def is_packed(case: Case, spec: TensorSpec) -> bool:
    """Whether the source has a weight in a form whose codes can be compared with those of the artifact."""
    source, scheme = case.source, case.contract.schemes[spec.module]
    if not isinstance(source, NativeCheckpoint) or spec.name not in source.quantized:
        return False
    return (source.quantized[spec.name].form == MXFP4) == (scheme.format == NVFP4) and scheme.format in (NVFP4, FP8)
