"""Many linears at once, on the device: whatever decodes to its source bit for bit needs no closer look."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.layout import TensorSpec
from dsv4q.verify.case import Case
from dsv4q.verify.linear import Linear, SharedScales
from dsv4q.verify.schemes import StoredScheme


class LinearBatch:
    """Linears of one shape and scheme with a source, judged together while they are as they should be.

    Whichever is not exact gets a judge of its own, which tells a defect from what a recipe rounds.
    """

    def __init__(self, case: Case, scheme: StoredScheme, specs: tuple[TensorSpec, ...]) -> None:
        self.case, self.scheme, self.specs = case, scheme, specs
        self.label = specs[0].block
        self.suffixes = tuple(scheme.stored(specs[0].shape))
        self.size = sum(case.sound[f"{spec.module}.{suffix}"].nbytes for spec in specs for suffix in self.suffixes)
        self.memory = self.size
        self.host: dict[str, Tensor] = {}

    def load(self) -> None:
        """Everything from the disk to the host, stacked: [linears, ...] of each tensor."""
        case, pinned = self.case, self.case.device is not None and self.case.device.type == "cuda"
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
        for spec, fine in zip(self.specs, good.tolist(), strict=True):
            if fine:
                case.log.looked_at("scales", len(scales))
                case.log.looked_at("exact")
                case.exact[spec.role] += 1
                continue
            linear = Linear(case, spec, self.scheme, SharedScales(case, {}, {}))
            linear.load()
            linear.judge()
        self.host.clear()

    def _equals_source(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Which of the linears decode to the source's finite weight bit for bit, -0 included; Bool [linears]."""
        source, shape = self.case.source, (len(self.specs), *self.specs[0].shape)
        assert source is not None
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self.case.device)
        for row, spec in zip(weight, self.specs, strict=True):
            source.copy_to(spec.name, row)
        decoded = self.scheme.decode(stored)["weight"]
        same = decoded.view(torch.int32) == weight.to(torch.float32).view(torch.int32)
        # Equal NaN or Inf are not equal weights; a sum has them if one element has.
        return same.flatten(1).all(dim=1) & decoded.flatten(1).sum(dim=1).isfinite()
