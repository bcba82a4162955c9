"""Linears that are calibrated as modules, under llmcompressor's hooks and observers.

A block has some hundred equal experts, so the work is done for many of them at once: scales by `formats/exact.py`,
NVFP4 by `formats/encode.py`. Whatever those do not know goes module by module through compressed-tensors itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.observers.min_max import StaticMinMaxObserver

from dsv4q.errors import RankError
from dsv4q.formats import stored as forms
from dsv4q.formats.compare import error_sums
from dsv4q.formats.dtypes import torch_dtypes
from dsv4q.formats.encode import E2M1_MAX, E4M3_MAX, nvfp4_encode
from dsv4q.formats.kernels import fp8_block_encode_measured
from dsv4q.model.model import release
from dsv4q.model.upstream import decode_state, encode_module, scheme_of, weights_on_every_rank
from dsv4q.recipe.schemes import FLOAT, NVFP4, PACKED_INT
from dsv4q.run.linears import (
    BATCH_ELEMENTS,
    GLOBAL_SCALES,
    EncodedLinears,
    InputScales,
    PlannedLinear,
    State,
    check_inputs,
)
from dsv4q.run.observers import ExactFp8BlockObserver, settle_nvfp4


@dataclass(frozen=True)
class ModuleLinears:
    """The linears of one block that are modules to llmcompressor too."""

    linears: Sequence[PlannedLinear]
    device: torch.device

    # ------------------------------------------------------------------------------------------ before the forward

    def prepare(self) -> None:
        """Give the quantization parameters memory: NaN until the observers fill them, so that no gap passes.

        Scales that are stored as BF16 or F32 are so from here on: the bytes are encoded under what is stored.
        """
        for linear in self.linears:
            stored = {t.name.rpartition(".")[2]: torch_dtypes()[t.dtype] for t in linear.planned}
            for name, parameter in linear.module._parameters.items():
                if name == "weight" or parameter is None:
                    continue
                wanted = stored.get(name)
                dtype = wanted if wanted in (torch.bfloat16, torch.float32) else parameter.dtype
                fresh = torch.zeros(parameter.shape, dtype=dtype, device=self.device)
                if not name.endswith("zero_point"):
                    fresh.fill_(float("nan"))
                linear.module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=False)

    def check_order_does_not_matter(self, every_rank_has_tokens: bool) -> None:
        """Refuse observers whose statistics several ranks cannot put together to the same bits.

        Raises:
            RankError: names the first such module.
        """
        for linear in self.linears:
            observer = linear.module._modules.get("input_observer")
            if observer is None:
                continue
            reached = every_rank_has_tokens and linear.spec.expert is None
            if type(observer) is not StaticMinMaxObserver or not reached:
                raise RankError(
                    "The statistics of this recipe's observers cannot be put together from several ranks",
                    where=f"input of {linear.spec.module}",
                    expected="static_minmax, and at least one micro-batch for every rank",
                    found=type(observer).__name__,
                    hint="run it in one process, without torchrun",
                )

    # --------------------------------------------------------------------------------------------------- the scales

    def settle(self, inputs: InputScales) -> None:
        """See `Linears.settle`; llmcompressor's lifecycle finds what our observers do not."""
        self._check_observed()
        self._settle_weight_scales()
        with weights_on_every_rank():
            LifecycleCallbacks.sequential_epoch_end([linear.module for linear in self.linears])
        for projection, linears in self._with_input_scale().items():
            self._settle_input_scales(projection, linears, inputs)

    def _check_observed(self) -> None:
        observed = [
            (linear, observer)
            for linear in self.linears
            if (observer := getattr(linear.module, "input_observer", None)) is not None and observer.has_statistics
        ]
        if observed:
            ends = torch.stack([torch.stack([o.min_vals.amin(), o.max_vals.amax()]) for _, o in observed])
            check_inputs([linear for linear, _ in observed], ends)

    def _settle_weight_scales(self) -> None:
        """Find the exact NVFP4 scales of many experts at once, w1 and w3 of one expert under one global scale."""
        fused: dict[str, list[torch.nn.Linear]] = defaultdict(list)
        for linear in self.linears:
            if linear.is_exact:
                fused[linear.spec.module.replace(".w3", ".w1")].append(linear.module)
        alike: dict[tuple[int, tuple[int, ...]], list[list[torch.nn.Linear]]] = defaultdict(list)
        for group in fused.values():
            alike[len(group), tuple(group[0].weight.shape)].append(group)
        for (size, shape), groups in alike.items():
            step = self._step(size * math.prod(shape))
            for start in range(0, len(groups), step):
                settle_nvfp4(groups[start : start + step])

    def _with_input_scale(self) -> dict[str, list[PlannedLinear]]:
        """Projection -> its linears that store an `input_global_scale`."""
        found: dict[str, list[PlannedLinear]] = defaultdict(list)
        for linear in self.linears:
            if linear.module._parameters.get("input_global_scale") is not None:
                found[linear.projection].append(linear)
        return found

    def _settle_input_scales(self, projection: str, linears: Sequence[PlannedLinear], inputs: InputScales) -> None:
        """Of one projection of all experts: from the bounds, or what was observed with fallback and headroom."""
        scales = torch.stack([linear.parameter("input_global_scale") for linear in linears])
        if inputs.are_bounds:
            scales = torch.full_like(scales, E4M3_MAX * E2M1_MAX / inputs.bounds[projection])
        else:
            scales, without = inputs.settled(projection, scales)
            inputs.unseen.update(linears[place].spec.expert or 0 for place in without)
        for linear, scale in zip(linears, scales, strict=True):
            linear.parameter("input_global_scale").copy_(scale)
        inputs.amax[projection] = E4M3_MAX * E2M1_MAX / float(scales.min())

    # ----------------------------------------------------------------------------------------------------- encoding

    def encoded(self, mine: Collection[str]) -> Iterator[EncodedLinears]:
        """See `Linears.encoded`; a module gives its weight up once it is encoded."""
        for linears in self._batches([linear for linear in self.linears if linear.spec.name in mine]):
            yield EncodedLinears(linears, *_encode_measured(linears))
            for linear in linears:
                release(linear.module)

    def _batches(self, linears: Sequence[PlannedLinear]) -> Iterator[tuple[PlannedLinear, ...]]:
        """In batches of equal role and shape, bounded in size; linears that are encoded one by one come alone."""
        alike: dict[tuple[str, tuple[int, ...], str], list[PlannedLinear]] = defaultdict(list)
        for linear in linears:
            name = "" if linear.is_nvfp4 else linear.spec.name
            alike[linear.spec.role, linear.spec.shape, name].append(linear)
        for (_, shape, _), same in alike.items():
            step = self._step(math.prod(shape))
            for start in range(0, len(same), step):
                yield tuple(same[start : start + step])

    def _step(self, elements: int) -> int:
        """How many things of so many elements are worked on at once."""
        return max(1, BATCH_ELEMENTS[self.device.type] // elements)


def _encode_measured(linears: Sequence[PlannedLinear]) -> tuple[State, torch.Tensor]:
    """Stored tensors of all linears, and what storing them did, as in `EncodedLinears`."""
    first = linears[0]
    if isinstance(getattr(first.module, "weight_observer", None), ExactFp8BlockObserver):
        # compressed-tensors adds a zero point of 0, which turns -0 into +0.
        scale = first.parameter("weight_scale")
        weight, sums = fp8_block_encode_measured(first.parameter("weight"), scale)
        return {"weight": weight[None], "weight_scale": scale[None]}, sums[None]
    stored = _encode(linears)
    return stored, error_sums(_stack(linears, "weight"), _decoded(first.module, stored))


def _encode(linears: Sequence[PlannedLinear]) -> State:
    """Stored tensors of all linears by suffix, each with a first dimension over the linears."""
    first = linears[0]
    if not first.is_nvfp4:
        return {name: value[None] for name, value in encode_module(first.module).items() if value is not None}
    names = [name for name in GLOBAL_SCALES if name in first.module._parameters]
    stored = {name: _stack(linears, name) for name in names}
    scale = _stack(linears, "weight_scale")
    stored["weight_packed"] = nvfp4_encode(
        _stack(linears, "weight"), scale, stored["weight_global_scale"], keep_negative_zero=first.is_exact
    )
    stored["weight_scale"] = scale.to(torch.float8_e4m3fn)
    return stored


def _stack(linears: Sequence[PlannedLinear], name: str) -> torch.Tensor:
    return torch.stack([linear.parameter(name) for linear in linears])


def _decoded(module: torch.nn.Linear, stored: State) -> torch.Tensor:
    """F32 [T, out, in] that the stored tensors of T linears under the scheme of `module` stand for."""
    form = _stored_form(scheme_of(module))
    if form is not None:
        return forms.decode(form, stored)
    count = next(iter(stored.values())).shape[0]
    alone = ({name: value[index] for name, value in stored.items()} for index in range(count))
    return torch.stack([decode_state(module, one).to(torch.float32) for one in alone])


def _stored_form(scheme: Any) -> forms.StoredForm | None:
    """How linears are stored under a scheme of compressed-tensors; None where it has to decode them itself."""
    kind, weights = str(getattr(scheme.format, "value", scheme.format)), scheme.weights
    if kind == NVFP4:
        return forms.NVFP4
    if kind == FLOAT and weights.block_structure == [128, 128]:
        return forms.FP8_BLOCKS
    if kind == PACKED_INT and weights.symmetric and weights.group_size and weights.num_bits in (4, 8):
        return forms.packed_integers(weights.num_bits, weights.group_size)
    return None
