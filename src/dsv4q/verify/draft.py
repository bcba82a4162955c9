"""Under which names the consumer builds the draft's linears, and which of them it can build quantized.

vLLM builds stage k as `model.layers.{num_hidden_layers + k}` with the main model's quantization_config. Of a DSpark
draft it asks by that name alone, and by the fused one where it fuses: wq_a with wkv, w1 with w3 of the shared experts,
the wkv of all stages once more as `model.context_wkv_proj`; main_proj is `model.main_proj`. It never asks for a name
with `mtp` (seen with vLLM 0.33.0's loader).
"""

from __future__ import annotations

from dsv4q.layout import DSPARK, HF_PROJECTION, Dims, Role, TensorSpec

_FUSED = {
    "attn.wq_a": ("attn.fused_wqa_wkv",),
    "attn.wkv": ("attn.fused_wqa_wkv",),
    "ffn.shared_experts.w1": ("ffn.shared_experts.gate_up_proj",),
    "ffn.shared_experts.w3": ("ffn.shared_experts.gate_up_proj",),
    "ffn.shared_experts.w2": ("ffn.shared_experts.down_proj",),
}
_WHOLE = {"main_proj": "model.main_proj", "attn.wkv": "model.context_wkv_proj"}
_LINEARS = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DRAFT_INPUT)


def may_be_quantized(dims: Dims, spec: TensorSpec) -> bool:
    """Whether the consumer can load this weight of the draft quantized: routed experts, of DSpark other linears too."""
    linear = spec.role == Role.ROUTED_EXPERT or (dims.draft.kind == DSPARK and spec.role in _LINEARS)
    return linear and len(spec.shape) == 2


def consumer_names(dims: Dims, spec: TensorSpec) -> tuple[str, ...]:
    """Names that decide how the consumer builds a linear of the draft; all of them must come to the same."""
    stage, tail = _stage(dims, spec), spec.module.removeprefix(f"{spec.block}.")
    if spec.role == Role.ROUTED_EXPERT:
        experts, _, projection = tail.rpartition(".")
        return tuple(f"{stage}.{experts}.{name}" for name in (projection, HF_PROJECTION[projection]))
    if dims.draft.kind == DSPARK:
        names = [_WHOLE[tail]] if tail in _WHOLE else []
        return (*(f"{stage}.{name}" for name in _FUSED.get(tail, (tail,)) if tail != "main_proj"), *names)
    return tuple(f"{stage}{inside}.{one}" for inside in ("", ".mtp_block") for one in _tails(spec))


def is_fused(dims: Dims, spec: TensorSpec) -> bool:
    """Whether the consumer asks for a linear of a DSpark draft by a name that no main layer has."""
    tail = spec.module.removeprefix(f"{spec.block}.")
    return dims.draft.kind == DSPARK and (tail in _FUSED or tail in _WHOLE)


def every_name(dims: Dims, spec: TensorSpec) -> tuple[str, ...]:
    """Names of a weight of the draft under every prefix and in both vocabularies, the consumer's among them."""
    stage = _stage(dims, spec)
    prefixes = (spec.block, f"model.{spec.block}", stage, f"{stage}.mtp_block")
    names = (f"{prefix}.{one}" for prefix in prefixes for one in _tails(spec))
    return tuple(dict.fromkeys((*names, *consumer_names(dims, spec))))


def _stage(dims: Dims, spec: TensorSpec) -> str:
    return f"model.layers.{dims.layers + int(spec.block.removeprefix('mtp.'))}"


def _tails(spec: TensorSpec) -> tuple[str, ...]:
    names = (spec.module, spec.hf_name.removesuffix(".weight"))
    return tuple(dict.fromkeys(name.removeprefix(f"{spec.block}.") for name in names))
