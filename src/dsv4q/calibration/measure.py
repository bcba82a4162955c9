"""What quantization did to a weight: decode what was stored and compare it with the source."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dsv4q.calibration.encode import fp8_block_decode, int_group_decode, nvfp4_decode
from dsv4q.calibration.upstream import decode_state, scheme_of
from dsv4q.checkpoint.schemes import FLOAT, NVFP4, PACKED_INT
from dsv4q.errorstats import Errors, TensorError


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, row-major, as bytes; a copy only if it lies on a device or is not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory; from a GPU by way of page-locked memory, which is several times as fast."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)


def decoded(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """F32 [T, out, in] that the stored tensors of T linears under the scheme of `module` stand for."""
    scheme = scheme_of(module)
    form, weights = str(getattr(scheme.format, "value", scheme.format)), scheme.weights
    if form == NVFP4:
        return nvfp4_decode(state["weight_packed"], state["weight_scale"], state["weight_global_scale"])
    if form == FLOAT and weights.block_structure == [128, 128]:
        return fp8_block_decode(state["weight"], state["weight_scale"])
    if form == PACKED_INT and weights.symmetric and weights.group_size and weights.num_bits in (4, 8):
        return int_group_decode(state["weight_packed"], state["weight_scale"], weights.num_bits, weights.group_size)
    count = next(iter(state.values())).shape[0]
    alone = ({name: value[index] for name, value in state.items()} for index in range(count))
    return torch.stack([decode_state(module, one).to(torch.float32) for one in alone])


def add_errors(errors: Errors, names: Sequence[str], weights: torch.Tensor, stored: torch.Tensor) -> None:
    """Measure tensors: `weights` of the source and `stored` F32, both [len(names), out, in]."""
    reference = weights.detach().to(torch.float32)
    # Bits, not values: a -0 that became +0 is not the source's element.
    same = (stored.view(torch.int32) == reference.view(torch.int32)).flatten(1).sum(dim=1)
    difference = stored - reference
    sums = torch.stack(
        [
            same.to(torch.float64) / reference[0].numel(),
            difference.square().sum(dim=(1, 2), dtype=torch.float64),
            reference.square().sum(dim=(1, 2), dtype=torch.float64),
            difference.abs().amax(dim=(1, 2)).to(torch.float64),
        ],
        dim=1,
    )
    for name, numbers in zip(names, sums.tolist(), strict=True):
        errors.add(name, TensorError(*numbers))


@dataclass
class Stopwatch:
    """Seconds by stage of one block."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] += time.perf_counter() - begin
