"""Many linears at once, on the device: whatever decodes to its source bit for bit needs no closer look."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.formats.error import TensorError
from dsv4q.layout import TensorSpec
from dsv4q.verify.case import Case
from dsv4q.verify.linear import Linear, SharedScales
from dsv4q.verify.schemes import StoredScheme


class LinearBatch:
    """Linears of one shape and scheme with a source, judged together while they are as they should be.

    Whichever is not exact gets a judge of its own, which tells a defect from what a recipe rounds. Of one that is exact
    that would find nothing: its codes are those that its source has under its scales, and the bounds are about errors.

    Args:
        quick: leave exact ones out of the statistics.
    """

    def __init__(self, case: Case, scheme: StoredScheme, specs: tuple[TensorSpec, ...], *, quick: bool) -> None:
        self.case, self.scheme, self.specs, self.quick = case, scheme, specs, quick
        self.label = specs[0].block
        self.suffixes = tuple(scheme.stored(specs[0].shape))
        self.size = sum(case.sound[f"{spec.module}.{suffix}"].nbytes for spec in specs for suffix in self.suffixes)
        self.memory = self.size + sum(spec.nbytes for spec in specs)
        self.host: dict[str, Tensor] = {}
        self.weights: list[Callable[[Tensor], None]] = []

    def load(self) -> None:
        """Everything from the disk to the host; of the artifact stacked: [linears, ...] of each tensor."""
        case, pinned = self.case, self.case.device is not None and self.case.device.type == "cuda"
        assert case.source is not None
        self.weights = [case.source.fetched(spec.name, pinned=pinned) for spec in self.specs]
        for suffix in self.suffixes:
            header = case.sound[f"{self.specs[0].module}.{suffix}"]
            raw = torch.empty((len(self.specs), header.nbytes), dtype=torch.uint8, pin_memory=pinned)
            for row, spec in zip(raw, self.specs, strict=True):
                case.artifact.read_into(f"{spec.module}.{suffix}", row.numpy().data)
            dtype = torch_dtypes()[header.dtype]
            self.host[suffix] = raw.view(dtype).reshape(len(self.specs), *header.shape)

    def judge(self) -> None:
        case = self.case
        stored = {suffix: tensor.to(case.device, non_blocking=True) for suffix, tensor in self.host.items()}
        good = self._equals_source(stored)
        scales = [suffix for suffix in self.suffixes if suffix.endswith("scale")]
        for number in (self.scheme.numbers(stored[suffix]) for suffix in scales):
            good &= (number.isfinite() & (number > 0)).flatten(1).all(dim=1)
        if not bool(good.any()):
            case.rounded.add(self.scheme.group)
        powers = self._powers_of_two(stored)
        for spec, fine, power in zip(self.specs, good.tolist(), powers, strict=True):
            if fine:
                self._is_exact(spec, len(scales), power)
                continue
            linear = Linear(case, spec, self.scheme, SharedScales(case, {}, {}))
            linear.load()
            linear.judge()
        self.host.clear()
        self.weights.clear()

    def _powers_of_two(self, stored: Mapping[str, Tensor]) -> list[bool]:
        """Of which linears every effective scale is a power of two."""
        units = self.scheme.unit(stored).reshape(len(self.specs), -1)
        found: list[bool] = (torch.frexp(units).mantissa == 0.5).all(dim=1).tolist()
        return found

    def _is_exact(self, spec: TensorSpec, scales: int, power: bool) -> None:
        """Count what was looked at, as a judge of its own would have."""
        case = self.case
        case.log.looked_at("scales", scales)
        if self.quick:
            case.log.looked_at("exact")
            case.exact[spec.role] += 1
            return
        case.log.looked_at("values", len(self.scheme.value_tensors(self.host)) if case.deep else 0)
        case.log.looked_at("encoding")
        case.log.looked_at("error")
        errors = case.errors[spec.role]
        errors.add(spec.module, TensorError(1.0, 0.0, 0.0, 0.0))
        errors.power_of_two_scales += power

    def _equals_source(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Which of the linears decode to the source's finite weight bit for bit, -0 included; Bool [linears]."""
        shape = (len(self.specs), *self.specs[0].shape)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self.case.device)
        for row, write in zip(weight, self.weights, strict=True):
            write(row)
        decoded = self.scheme.decode(stored)["weight"]
        same = decoded.view(torch.int32) == weight.to(torch.float32).view(torch.int32)
        # Equal NaN or Inf are not equal weights; a sum has them if one element has.
        return same.flatten(1).all(dim=1) & decoded.flatten(1).sum(dim=1).isfinite()
