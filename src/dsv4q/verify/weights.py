"""Quantized linears of an artifact: scales, packed values, and the source encoded again.

Memory: one linear at a time is judged, with its source as F32 and some temporaries of that size; the next are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4q.formats.encode import (
    fp8_block_decode,
    fp8_block_encode,
    int_group_decode,
    int_group_encode,
    nvfp4_decode,
    nvfp4_encode,
    nvfp4_scale,
)
from dsv4q.layout import TensorSpec
from dsv4q.verify.bounds import (
    E2M1,
    E4M3,
    Blocks,
    Grid,
    dishonest_scales,
    far_elements,
    integer_grid,
    powers_of_two,
)
from dsv4q.verify.case import FLOATS, Case, place
from dsv4q.verify.config import FP8, INT, NVFP4, Scheme
from dsv4q.verify.result import ErrorStats, TensorError

_PAIRED = ("weight_global_scale", "input_global_scale")


class Linear:
    """One quantized linear, all of whose tensors are sound by their headers."""

    def __init__(self, case: Case, spec: TensorSpec, scheme: Scheme, errors: Mapping[str, ErrorStats]) -> None:
        self.case, self.spec, self.scheme, self.errors = case, spec, scheme, errors
        self.names = {suffix: f"{spec.module}.{suffix}" for suffix in scheme.stored(spec.shape)}
        self.label = spec.block
        self.size = sum(case.survey.sound[name].nbytes for name in self.names.values())
        self.memory = self.size + (0 if case.source is None else spec.nbytes)
        self.stored: dict[str, Tensor] = {}
        self.partner: dict[str, Tensor] = {}
        self.weight: Tensor | None = None

    def load(self) -> None:
        """Everything from the disk to the device."""
        artifact, device = self.case.artifact, self.case.device
        self.stored = {suffix: artifact.tensor(name).to(device) for suffix, name in self.names.items()}
        if self.case.deep and self.scheme.format == NVFP4 and self.spec.module.endswith(".w1"):
            there = {suffix: self._partner(suffix) for suffix in _PAIRED if suffix in self.names}
            self.partner = {s: artifact.tensor(n).to(device) for s, n in there.items() if n in self.case.survey.sound}
        if self.case.source is not None and self._source_fault() is None:
            self.weight = self.case.source.tensor(self.spec.name).to(device)

    def judge(self) -> None:
        usable = self._scales()
        if self.case.deep:
            self._packed()
            self._pair()
        if self.case.source is None or not usable:
            return
        fault = self._source_fault()
        if fault is not None:
            wanted = f"{self.spec.dtype} {list(self.spec.shape)} in the source"
            self.case.differs("source", self.spec.name, wanted, fault)
        elif self.weight is not None and not bool(self.weight.isfinite().all()):
            where = f"not at {place(~self.weight.isfinite())}"
            self.case.differs("source", self.spec.name, "finite weights in the source", where)
        elif self.weight is not None:
            self._against_source(self.weight)

    # ------------------------------------------------------------------------------------ by itself

    def _scales(self) -> bool:
        """Every scale finite and positive."""
        fine = True
        for suffix in (suffix for suffix in self.stored if suffix.endswith("scale")):
            self.case.log.looked_at("scales")
            scale = self._number(self.stored[suffix])
            if bool((scale.isfinite() & (scale > 0)).all()):
                continue
            fine = False
            kinds = {
                "NaN": scale.isnan(), "infinite": scale.isinf(), "zero": scale == 0, "negative": scale < 0,
            }  # fmt: skip
            for kind, mask in kinds.items():
                if bool(mask.any()):
                    found = f"{int(mask.sum()):,} of {mask.numel():,} are {kind}, the first at {place(mask)}"
                    self.case.differs("scales", self.names[suffix], "scales that are finite and positive", found)
        return fine

    def _number(self, scale: Tensor) -> Tensor:
        """F32."""
        return scale.to(torch.float32)

    def _packed(self) -> None:
        """What can be wrong in the values without knowing the source. Every NVFP4 byte is a pair of valid values."""
        self.case.log.looked_at("values")
        if self.scheme.format == FP8:
            nan = self.stored["weight"].view(torch.uint8).bitwise_and(0x7F) == 0x7F
            if bool(nan.any()):
                found = f"{int(nan.sum()):,} NaN (0x7F or 0xFF), the first at {place(nan)}"
                self.case.differs("values", self.names["weight"], "E4M3 values without NaN", found)
        if self.scheme.format == INT:
            shape = self.stored["weight_shape"].tolist()
            if shape != list(self.spec.shape):
                self.case.differs("values", self.names["weight_shape"], str(list(self.spec.shape)), str(shape))
            used = self.spec.shape[1] * self.scheme.bits % 32
            filling = self.stored["weight_packed"][:, -1] >> used if used else torch.zeros(1)
            if bool((filling != 0).any()):
                name = self.names["weight_packed"]
                self.case.differs("values", name, "zero bits after the last column", "other bits")

    def _pair(self) -> None:
        """The consumer fuses w1 and w3 and uses one scale for both."""
        for suffix, other in self.partner.items():
            self.case.log.looked_at("pairs")
            mine = self.stored[suffix]
            if not torch.equal(other.view(torch.int32), mine.view(torch.int32)):
                expected = f"{mine.item()!r}, as {self.names[suffix]}"
                self.case.differs("pairs", self._partner(suffix), expected, repr(other.item()))

    def _partner(self, suffix: str) -> str:
        return f"{self.spec.module.removesuffix('.w1')}.w3.{suffix}"

    # ------------------------------------------------------------------------------------ against the source

    def _source_fault(self) -> str | None:
        assert self.case.source is not None
        entry = self.case.source.tensors.get(self.spec.name)
        if entry is None:
            return "no such tensor"
        return None if entry.dtype in FLOATS and entry.shape == self.spec.shape else f"{entry.dtype} {[*entry.shape]}"

    def _against_source(self, weight: Tensor) -> None:
        self.case.log.looked_at("encoding")
        values = "weight" if self.scheme.format == FP8 else "weight_packed"
        decoded, full, unit = _decode(self.scheme, self.stored), weight.to(torch.float32), _unit(self.stored)
        self.errors[self.spec.role].add(self.spec.module, tensor_error(full, decoded, unit))
        if not self._reencodes(weight, self.stored[values].view(torch.uint8), self.names[values]):
            return
        self.case.log.looked_at("error")
        grid = {NVFP4: E2M1, FP8: E4M3}.get(self.scheme.format) or integer_grid(self.scheme.bits)
        blocks = _blocks(self.scheme, full, decoded, unit)
        # encode divides in the promoted dtype; only BF16 by BF16 rounds the quotient to BF16.
        bf16 = self.scheme.format != NVFP4 and weight.dtype == self.stored["weight_scale"].dtype == torch.bfloat16
        far = far_elements(blocks, grid, bf16_quotient=bf16)
        self._far(far, self.names[values])
        self._scale_choice(blocks, grid)

    def _reencodes(self, weight: Tensor, stored: Tensor, name: str) -> bool:
        """The whole tensor is what these scales give, with every -0 kept or with none."""
        unequal: list[tuple[Tensor, Tensor]] = []
        for keep in (True, False):
            again = _encode(self.scheme, self.stored, weight, keep_negative_zero=keep).view(torch.uint8)
            if torch.equal(again, stored):
                return True
            unequal.append((again, again != stored))
        again, mask = min(unequal, key=lambda pair: int(pair[1].sum()))
        self._told(name, mask, again, stored)
        return False

    def _told(self, name: str, mask: Tensor, again: Tensor, stored: Tensor) -> None:
        first = place(mask)
        found = (
            f"{int(mask.sum()):,} of {mask.numel():,} bytes differ, the first at {first}: "
            f"0x{int(stored[tuple(first)]):02x} instead of 0x{int(again[tuple(first)]):02x}"
        )
        self.case.differs("encoding", name, "the source's weight, encoded with the artifact's own scales", found)

    def _far(self, far: Tensor, name: str) -> None:
        if bool(far.any()):
            found = f"{int(far.sum()):,} of {far.numel():,} values are farther off"
            self.case.differs("error", name, "values within half a step of the source's", found)

    def _scale_choice(self, blocks: Blocks, grid: Grid) -> None:
        wrong = dishonest_scales(blocks, grid, self.stored.get("weight_global_scale"))
        if not bool(wrong.any()):
            return
        scale = self.stored["weight_scale"]
        first = int(wrong.nonzero()[0])
        where = list(divmod(first, scale.shape[-1])) if scale.ndim > 1 else [first]
        ideal = float(blocks.weight[first].abs().amax()) / grid.range
        found = (
            f"{int(wrong.sum()):,} of {wrong.numel():,} scales, the first at {where}: one unit is worth "
            f"{float(blocks.unit[first]):.6g}, the source needs {ideal:.6g}"
        )
        expected = "scales that the source's largest magnitudes explain"
        self.case.differs("error", self.names["weight_scale"], expected, found)


def tensor_error(full: Tensor, decoded: Tensor, unit: Tensor) -> TensorError:
    """Error of `decoded` against `full`, both F32 [out, in]; `unit` holds the effective scales."""
    difference = (full - decoded).abs_()
    return TensorError(
        signal=float(full.square().sum(dtype=torch.float64)),
        max_abs=float(difference.amax()),
        noise=float(difference.square_().sum(dtype=torch.float64)),
        exact=torch.equal(decoded.view(torch.int32), full.view(torch.int32)),
        power_of_two=powers_of_two(unit),
    )


def _encode(scheme: Scheme, stored: Mapping[str, Tensor], weight: Tensor, *, keep_negative_zero: bool) -> Tensor:
    """The bytes that these scales give, each -0 kept or stored as +0: encoders do either, throughout a tensor."""
    if scheme.format == NVFP4:
        return nvfp4_encode(
            weight, stored["weight_scale"], stored["weight_global_scale"], keep_negative_zero=keep_negative_zero
        )
    if scheme.format == FP8:
        return fp8_block_encode(weight if keep_negative_zero else weight + 0.0, stored["weight_scale"])
    return int_group_encode(weight, stored["weight_scale"], scheme.bits, scheme.columns or weight.shape[-1])


def _decode(scheme: Scheme, stored: Mapping[str, Tensor]) -> Tensor:
    """F32 [out, in]."""
    if scheme.format == NVFP4:
        return nvfp4_decode(stored["weight_packed"], stored["weight_scale"], stored["weight_global_scale"])
    if scheme.format == FP8:
        return fp8_block_decode(stored["weight"], stored["weight_scale"])
    columns = scheme.columns or stored["weight_packed"].shape[-1] * 32 // scheme.bits
    return int_group_decode(stored["weight_packed"], stored["weight_scale"], scheme.bits, columns)


def _unit(stored: Mapping[str, Tensor]) -> Tensor:
    """Effective scales, F32 [n]: in the order of `_blocks`."""
    scale, divisor = stored["weight_scale"], stored.get("weight_global_scale")
    return (scale.to(torch.float32) if divisor is None else nvfp4_scale(scale, divisor)).flatten()


def _blocks(scheme: Scheme, weight: Tensor, decoded: Tensor, unit: Tensor) -> Blocks:
    if scheme.format == FP8:
        return Blocks(_squares(weight), _squares(decoded), unit)
    columns = weight.numel() // unit.numel()
    return Blocks(weight.reshape(-1, columns), decoded.reshape(-1, columns), unit)


def _squares(weight: Tensor) -> Tensor:
    """[n, 128*128] of [out, in], blocks row by row; the edge is filled with zeros, which have no error."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padding = (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0])
    filled = torch.nn.functional.pad(weight, padding)
    return filled.reshape(rows, 128, columns, 128).transpose(1, 2).reshape(rows * columns, -1)
