"""The modules of one block that get compressed: their parameters, their scales, their encoded form.

A block has some hundred equal experts, so the work is done for many of them at once: scales by `exact.py`, NVFP4 by
`encode.py`. Whatever those do not know goes module by module through compressed-tensors itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.observers.min_max import StaticMinMaxObserver

from dsv4q.config import Activations
from dsv4q.errors import CalibrationError, RankError
from dsv4q.formats import stored as forms
from dsv4q.formats.compare import error_sums
from dsv4q.formats.encode import E2M1_MAX, E4M3_MAX, fp8_block_encode, nvfp4_encode
from dsv4q.formats.error import Errors
from dsv4q.layout import TensorSpec
from dsv4q.model.upstream import decode_state, encode_module, scheme_of
from dsv4q.plan.plan import PlannedTensor
from dsv4q.recipe.schemes import FLOAT, NVFP4, PACKED_INT
from dsv4q.run.observers import ExactFp8BlockObserver, ExactNvfp4Observer, settle_nvfp4

GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")

BATCH_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Weight elements that are worked on at once: bounds the temporaries to some hundred MB, some GB on a GPU."""

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """One linear to be compressed."""

    spec: TensorSpec
    module: torch.nn.Linear
    planned: tuple[PlannedTensor, ...]

    @property
    def projection(self) -> str:
        """`w1`, `wq_a`, ..."""
        return self.spec.module.rpartition(".")[2]

    @property
    def is_nvfp4(self) -> bool:
        """Whether `encode.py` has this scheme."""
        scheme = scheme_of(self.module)
        form = str(getattr(scheme.format, "value", scheme.format))
        inputs = scheme.input_activations
        return (
            form == NVFP4
            and bool(scheme.weights.symmetric)
            and scheme.weights.strategy == "tensor_group"
            and (inputs is None or inputs.dynamic == "local")
        )

    @property
    def is_exact(self) -> bool:
        return isinstance(getattr(self.module, "weight_observer", None), ExactNvfp4Observer)

    def encode(self) -> State:
        """Stored tensors by suffix, made by compressed-tensors."""
        state = encode_module(self.module)
        if isinstance(getattr(self.module, "weight_observer", None), ExactFp8BlockObserver):
            # compressed-tensors adds a zero point of 0, which turns -0 into +0.
            state["weight"] = fp8_block_encode(_parameter(self, "weight"), state["weight_scale"])
        return state


@dataclass(frozen=True)
class Batch:
    """Linears of one shape and role, encoded together where that is possible; others come one by one."""

    members: tuple[Member, ...]

    @property
    def role(self) -> str:
        return self.members[0].spec.role

    def encode(self) -> State:
        """Stored tensors of all members by suffix, each with a first dimension over the members."""
        first = self.members[0]
        if not first.is_nvfp4:
            state = first.encode()
            return {name: value[None] for name, value in state.items() if value is not None}
        names = [name for name in GLOBAL_SCALES if name in first.module._parameters]
        stored = {name: self._stack(name) for name in names}
        scale = self._stack("weight_scale")
        stored["weight_packed"] = nvfp4_encode(
            self._stack("weight"), scale, stored["weight_global_scale"], keep_negative_zero=first.is_exact
        )
        stored["weight_scale"] = scale.to(torch.float8_e4m3fn)
        return stored

    def measure(self, stored: State, errors: Errors) -> None:
        """Add the error of every member, decoded from its stored tensors, to `errors`."""
        sums = error_sums(self._stack("weight"), _decoded(self.members[0].module, stored))
        errors.add_all([m.spec.name for m in self.members], sums.tolist())

    def _stack(self, name: str) -> torch.Tensor:
        return torch.stack([_parameter(member, name) for member in self.members])


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


def _parameter(member: Member, name: str) -> torch.Tensor:
    parameter = member.module._parameters[name]
    assert parameter is not None, f"{member.spec.module}.{name}"
    return parameter.detach()


def check_scales(members: Sequence[Member], stored: Mapping[str, torch.Tensor]) -> None:
    """Refuse scales that no consumer can use, among the stored tensors [T, ...] of T members.

    Raises:
        CalibrationError: a scale that is zero, negative, NaN or infinite; names the first such module.
    """
    for name, value in stored.items():
        if not name.endswith("scale"):
            continue
        if value.dtype is torch.float8_e4m3fn:
            # 0x00 is zero, 0x80 and above are negative, 0x7f is NaN; there is no infinity.
            bad = (value.view(torch.uint8) - 1) > 0x7D
        else:
            bad = ~(torch.isfinite(value) & (value > 0))
        if not bool(bad.any()):
            continue
        at = int(bad.flatten(1).any(dim=1).nonzero()[0])
        raise CalibrationError(
            "A scale is not positive and finite",
            where=f"{members[at].spec.module}.{name}",
            expected="every element finite and above zero",
            found=f"{int(bad[at].sum())} of {bad[at].numel()} are not, e.g. {float(value[at][bad[at]][0])}",
            hint="an input scale without tokens: use activations.experts: all, or routed with a fallback",
        )


def not_finite_input(member: Member, ends: list[float]) -> CalibrationError:
    """The error for an input whose smallest and largest values are `ends`."""
    return CalibrationError(
        "The activations became non-finite while calibrating",
        where=f"input of {member.spec.module}",
        expected="a finite smallest and largest value",
        found=ends,
        hint="the source's weights of this layer are damaged or not of this architecture",
    )


def settled_scales(scales: torch.Tensor, where: str, activations: Activations) -> tuple[torch.Tensor, list[int]]:
    """Apply fallback and headroom to observed input scales F32 [T, 1], NaN where no token came.

    Returns:
        The scales, and the places of those that took the fallback: the smallest global scale, i.e. the largest amax.

    Raises:
        CalibrationError: no token reached any of them.
    """
    seen = torch.isfinite(scales).all(dim=1)
    if not bool(seen.any()):
        raise CalibrationError(
            "No calibration token reached any expert of a layer",
            where=where,
            hint="calibrate on more tokens, or with activations: {experts: all}",
        )
    unseen: list[int] = []
    if activations.fallback is not None:
        unseen = [int(n) for n in (~seen).nonzero().flatten()]
        scales[~seen] = scales[seen].amin(dim=0)
    if activations.headroom != 1.0:
        scales /= activations.headroom
    return scales, unseen


def members_of(model: torch.nn.Module, tensors: Iterable[PlannedTensor]) -> list[Member]:
    """The linears to be compressed among the planned tensors of a block."""
    planned: dict[TensorSpec, list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.encoded:
            planned[tensor.spec].append(tensor)
    return [Member(spec, _linear(model, spec), tuple(found)) for spec, found in planned.items()]


class BlockModules:
    """Members of one block that are calibrated as modules."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.device = device
        self.members = list(members)

    def batches(self) -> Iterator[Batch]:
        """The members in batches of equal role and shape, bounded in size."""
        alike: dict[tuple[str, tuple[int, ...], str], list[Member]] = defaultdict(list)
        for member in self.members:
            name = "" if member.is_nvfp4 else member.spec.name
            alike[member.spec.role, member.spec.shape, name].append(member)
        for (_, shape, _), members in alike.items():
            step = self._step(math.prod(shape))
            for start in range(0, len(members), step):
                yield Batch(tuple(members[start : start + step]))

    def _step(self, elements: int) -> int:
        """How many things of so many elements are worked on at once."""
        return max(1, BATCH_ELEMENTS[self.device.type] // elements)

    def input_amax(self) -> dict[str, float]:
        """Largest magnitude that each projection's settled `input_global_scale` represents, over all experts."""
        return {
            projection: E4M3_MAX
            * E2M1_MAX
            / float(torch.cat([_parameter(m, "input_global_scale") for m in found]).min())
            for projection, found in self._with_input_scale().items()
        }

    def _with_input_scale(self) -> dict[str, list[Member]]:
        """Projection -> its members that store an `input_global_scale`."""
        found: dict[str, list[Member]] = defaultdict(list)
        for member in self.members:
            if member.module._parameters.get("input_global_scale") is not None:
                found[member.projection].append(member)
        return found

    def check_order_does_not_matter(self, every_rank_has_tokens: bool) -> None:
        """Refuse observers whose statistics several ranks cannot put together to the same bits.

        Raises:
            RankError: names the first such module.
        """
        for member in self.members:
            observer = member.module._modules.get("input_observer")
            if observer is None:
                continue
            reached = every_rank_has_tokens and member.spec.expert is None
            if type(observer) is not StaticMinMaxObserver or not reached:
                raise RankError(
                    "The statistics of this recipe's observers cannot be put together from several ranks",
                    where=f"input of {member.spec.module}",
                    expected="static_minmax, and at least one micro-batch for every rank",
                    found=type(observer).__name__,
                    hint="run it in one process, without torchrun",
                )

    def prepare(self) -> None:
        """Give the quantization parameters memory: NaN until the observers fill them, so that no gap passes."""
        for member in self.members:
            for name, parameter in member.module._parameters.items():
                if name == "weight" or parameter is None:
                    continue
                fresh = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
                if not name.endswith("zero_point"):
                    fresh.fill_(float("nan"))
                member.module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=False)

    def check_observed(self) -> None:
        """Refuse non-finite input statistics: compressed-tensors would turn them into a global scale of 1.0."""
        observed = [
            (member, observer)
            for member in self.members
            if (observer := getattr(member.module, "input_observer", None)) is not None and observer.has_statistics
        ]
        if not observed:
            return
        ends = torch.stack([torch.stack([o.min_vals.amin(), o.max_vals.amax()]) for _, o in observed])
        bad = (~torch.isfinite(ends)).any(dim=1)
        if not bool(bad.any()):
            return
        at = int(bad.nonzero()[0])
        raise not_finite_input(observed[at][0], ends[at].tolist())

    def settle_weight_scales(self) -> None:
        """Find the exact NVFP4 scales of many experts at once, w1 and w3 of one expert under one global scale."""
        fused: dict[str, list[torch.nn.Linear]] = defaultdict(list)
        for member in self.members:
            if member.is_exact:
                fused[member.spec.module.replace(".w3", ".w1")].append(member.module)
        alike: dict[tuple[int, tuple[int, ...]], list[list[torch.nn.Linear]]] = defaultdict(list)
        for group in fused.values():
            alike[len(group), tuple(group[0].weight.shape)].append(group)
        for (size, shape), groups in alike.items():
            step = self._step(size * math.prod(shape))
            for start in range(0, len(groups), step):
                settle_nvfp4(groups[start : start + step])

    def bound_input_scales(self, bounds: Mapping[str, float]) -> None:
        """Set `input_global_scale` from the largest magnitude that each projection's input can have."""
        for projection, members in self._with_input_scale().items():
            for member in members:
                _parameter(member, "input_global_scale").fill_(E4M3_MAX * E2M1_MAX / bounds[projection])

    def settle_input_scales(self, activations: Activations) -> list[int]:
        """Apply fallback and headroom to observed `input_global_scale`; returns the experts that saw no token.

        Raises:
            CalibrationError: no token reached any expert.
        """
        unseen: set[int] = set()
        for projection, members in self._with_input_scale().items():
            scales = torch.stack([_parameter(m, "input_global_scale") for m in members])
            where = f"{members[0].spec.block}, projection {projection}"
            scales, without = settled_scales(scales, where, activations)
            unseen |= {members[place].spec.expert or 0 for place in without}
            for member, scale in zip(members, scales, strict=True):
                _parameter(member, "input_global_scale").copy_(scale)
        return sorted(unseen)


def _linear(model: torch.nn.Module, spec: TensorSpec) -> torch.nn.Linear:
    module = model.get_submodule(spec.hf_name.removesuffix(".weight"))
    assert isinstance(module, torch.nn.Linear), spec.hf_name
    return module
