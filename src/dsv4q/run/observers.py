"""llmcompressor observers that give exact scales where the weight is on the grid (see exact.py for the grids).

Importing this module registers them, so that any recipe can name them:

    exact_nvfp4      weights of an NVFP4 scheme (tensor_group 16); modules that llmcompressor fuses share a global scale
    exact_fp8_block  weights of an FP8 scheme with 128x128 blocks

Module by module they work inside any `oneshot`. The streaming pipeline settles a whole layer's experts in one batch
first (`settle_nvfp4`); the observers then just hand the finished scales out, so both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llmcompressor.observers import Observer
from llmcompressor.observers.base import QParamsDict
from torch import Tensor, nn

from dsv4q.formats.encode import FP8_BLOCK, NVFP4_GROUP
from dsv4q.formats.exact import fp8_block_scales, nvfp4_scales

NVFP4_NAME = "exact_nvfp4"
FP8_BLOCK_NAME = "exact_fp8_block"


class _ExactObserver(Observer):
    """Keeps a reference to the weight until the scales are asked for."""

    _stats_attrs = ["observed"]  # noqa: RUF012 - the name and form that the base class wants

    observed: Tensor

    def update_statistics_from_observed(self, observed: Tensor) -> None:
        """`observed`: [1, *scale shape, values per scale], as llmcompressor flattens weights."""
        self.observed = observed.detach()

    @torch.no_grad()
    def get_qparams(self) -> QParamsDict:
        """Scales of the weight observed last; releases it."""
        scale, global_scale = self._scales()
        self.delete_statistics()
        zero_point = torch.zeros(scale.shape, dtype=self.args.zp_dtype, device=scale.device)
        return {"scale": scale, "zero_point": zero_point, "global_scale": global_scale}

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


@Observer.register(NVFP4_NAME)
class ExactNvfp4Observer(_ExactObserver):
    """Block scales F32 [M, N/16] with E4M3 values and a power-of-two global scale F32 [1].

    Raises:
        ValueError: used on anything but weights in groups of 16 with a global scale.
    """

    def __init__(self, base_name: str, args: Any, **kwargs: Any) -> None:
        super().__init__(base_name, args, **kwargs)
        if (
            base_name != "weight"
            or args.strategy != "tensor_group"
            or args.group_size != NVFP4_GROUP
            or args.num_bits != 4
        ):
            raise ValueError(f"observer {NVFP4_NAME} is for NVFP4 weights: tensor_group of {NVFP4_GROUP}")
        self.settled: tuple[Tensor, Tensor] | None = None

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        if self.settled is not None:
            settled, self.settled = self.settled, None
            return settled
        # Own blocks first, then those of the modules that share the global scale, as one column of blocks.
        members = [stats["observed"] for stats in self.fusion_handler.get_fused_statistics()]
        blocks = torch.cat([member.reshape(-1, NVFP4_GROUP) for member in members])
        found = nvfp4_scales(blocks[None, None])
        own = members[0].shape[1:3]
        return found.block_scale[0, 0, : own.numel(), 0].reshape(own), found.global_scale[0]


@Observer.register(FP8_BLOCK_NAME)
class ExactFp8BlockObserver(_ExactObserver):
    """Power-of-two scales F32 [ceil(M/128), ceil(N/128)].

    Raises:
        ValueError: used on anything but FP8 weights in 128x128 blocks.
    """

    def __init__(self, base_name: str, args: Any, **kwargs: Any) -> None:
        super().__init__(base_name, args, **kwargs)
        if (
            base_name != "weight"
            or args.block_structure != [FP8_BLOCK, FP8_BLOCK]
            or args.num_bits != 8
            or args.type != "float"
        ):
            raise ValueError(f"observer {FP8_BLOCK_NAME} is for FP8 weights in blocks of {FP8_BLOCK}x{FP8_BLOCK}")

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        blocks = self.observed[0]
        rows, columns, _ = blocks.shape
        square = (
            blocks.reshape(rows, columns, FP8_BLOCK, FP8_BLOCK)
            .transpose(1, 2)
            .reshape(rows * FP8_BLOCK, columns * FP8_BLOCK)
        )
        return fp8_block_scales(square), None


def settle_nvfp4(groups: Sequence[Sequence[nn.Linear]]) -> None:
    """Find the scales of many groups of equal shape at once; each group's modules share a global scale.

    Every module's weight observer must be an `ExactNvfp4Observer`; it has its scales ready afterwards.
    """
    weight = torch.stack([torch.stack([module.weight.detach() for module in group]) for group in groups])
    found = nvfp4_scales(weight)
    for t, group in enumerate(groups):
        for p, module in enumerate(group):
            observer = module.weight_observer
            assert isinstance(observer, ExactNvfp4Observer)
            observer.observed = module.weight.detach()
            observer.settled = (found.block_scale[t, p], found.global_scale[t])
