"""Every touch of another library's inside, in one file: reason, link, versions, and undone on exit.

Nothing else in the package reaches into transformers, llmcompressor or compressed-tensors beyond their documented
entry points. Each function states why it exists and when it can go.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def without_module(name: str) -> Iterator[None]:
    """Context in which a module that nothing has imported yet is as good as not installed.

    Reason: transformers imports scikit-learn where it is there, for assisted generation, which nothing here does. That
    takes a second or more of every command that builds a model. For transformers it is not there from then on.
    Link: transformers `generation/candidate_generator.py`. Versions: 5.15 to 5.17. Goes when it is imported on use.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what Python's import system takes for "not there"
    try:
        yield
    finally:
        del sys.modules[name]


with without_module("sklearn"):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization.lifecycle import apply
    from compressed_tensors.utils import get_direct_state_dict, patch_attr
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modifiers.quantization.quantization import base as modifier_base
    from loguru import logger
    from transformers import PreTrainedModel, conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
    from transformers.utils import logging as transformers_logging

_TALKATIVE = ("llmcompressor", "compressed_tensors")

F32_TENSORS = ("attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "e_score_correction_bias")
"""Parts of transformers names whose tensors the checkpoint stores as F32 and whose module computes with them so."""


@contextmanager
def checkpoint_names(model_type: str, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Let `from_pretrained` and `save_pretrained` of `model_type` rename tensors by `pairs`; restored on exit.

    Args:
        pairs: anchored regexes (name in the checkpoint, name in the model), applied in order while loading and in
            reverse order while saving. A model remembers the pairs it was loaded with, so that it can be saved
            outside this context.

    Reason: the stock mapping of deepseek_v4 cannot be inverted (`attn.kv_norm` comes back as `attn.norm`).
    Link: transformers `conversion_mapping.py`, `register_checkpoint_conversion_mapping`. Versions: 5.15 to 5.17.
    It has no counterpart that unregisters, hence the two private names below. Goes when the stock mapping
    round-trips, MTP included.
    """
    before = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    by_user = model_type in conversion_mapping.USER_REGISTERED_MAPPINGS
    renamings = [WeightRenaming(source_patterns=source, target_patterns=target) for source, target in pairs]
    conversion_mapping.register_checkpoint_conversion_mapping(model_type, renamings, overwrite=True)
    try:
        yield
    finally:
        if before is None:
            conversion_mapping._checkpoint_conversion_mapping_cache.pop(model_type)
        else:
            conversion_mapping.register_checkpoint_conversion_mapping(model_type, before, overwrite=True)
        if not by_user:
            conversion_mapping.USER_REGISTERED_MAPPINGS.discard(model_type)


def load_every_tensor_in_its_dtype(model: PreTrainedModel) -> None:
    """Make `from_pretrained` report `mtp.*` it has no place for, keep F32 tensors F32 and leave the norms in BF16.

    Reason: `DeepseekV4PreTrainedModel` drops such `mtp.*` without a word and raises all norms to F32, which a BF16
    forward then refuses. Class attributes of a subclass do not help, because `post_init` unions those of the
    children into the parent's: so the two sets are replaced on the instance, after `post_init`.
    Link: transformers `modeling_utils.py`, `PreTrainedModel.post_init`. Versions: 5.15 to 5.17. Goes when upstream
    has MTP modules. Nothing to undo: only this instance changes.
    """
    model._keys_to_ignore_on_load_unexpected = set()
    model._keep_in_fp32_modules_strict = set(F32_TENSORS)


def linear_experts() -> type[nn.Module]:
    """Class of routed experts as separate 2-D linears `E.gate_proj`, `E.up_proj`, `E.down_proj`.

    Reason: quantization works on linears, upstream names are per expert, and llmcompressor's own way there
    (`load_context`) patches `AutoModelForCausalLM` and imports torchvision.
    Link: llmcompressor `modeling/moe/linear_experts.py`. Versions: 0.14. The class is cached by llmcompressor
    itself, so this is the same class that stock llmcompressor would use.
    """
    experts: type[nn.Module] = LinearExperts2D.get_linear_experts_cls(DeepseekV4Experts)
    return experts


@contextmanager
def experts_forward(experts: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let a module of routed experts compute with `forward`; its own comes back on exit.

    Reason: its own calls every expert's linears one by one. Link: llmcompressor `modeling/moe/linear_experts.py`,
    `LinearExperts2D.forward`. Versions: 0.14. An attribute of the instance hides the method of its class.
    """
    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


@contextmanager
def weights_on_every_rank() -> Iterator[None]:
    """Let `QuantizationModifier` find weight scales on every rank, though it knows that there are several.

    Reason: it splits the weights over ranks and broadcasts the scales, but not those of modules on a CPU. The few
    linears that are left to it cost less than the broadcast, and each rank finds the same bits. Statistics of
    activations are still reduced by it. Link: llmcompressor `modifiers/quantization/quantization/base.py`.
    Versions: 0.14.
    """
    with patch_attr(modifier_base, "is_distributed", lambda: False):
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep llmcompressor's and compressed-tensors' log lines, tqdm bars and config warnings off the terminal.

    Reason: they speak once per module, of things that dsv4q checks itself and reports by name. Link: loguru
    `logger.disable`. Versions: any. `DSV4Q_DEBUG=1` lets everything through.
    """
    if os.environ.get("DSV4Q_DEBUG"):
        yield
        return
    for name in _TALKATIVE:
        logger.disable(name)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with patch_attr(apply, "tqdm", lambda items, **_: items):
            yield
    finally:
        transformers_logging.set_verbosity(before)
        for name in _TALKATIVE:
            logger.enable(name)


def scheme_of(module: nn.Module) -> Any:
    """The `QuantizationScheme` that compressed-tensors attached to a module as a plain attribute."""
    return module.__dict__["quantization_scheme"]


def _compressor_of(module: nn.Module) -> Any:
    return BaseCompressor.get_value_from_registry(str(CompressionFormat(scheme_of(module).format).value))


def encode_module(module: nn.Module) -> dict[str, torch.Tensor]:
    """Compressed form of one calibrated linear, by suffix (`weight_packed`, `weight_scale`, ...).

    Any scheme that compressed-tensors knows: this is what its `compress_module` stores, but as a plain dict, and
    the module stays as it is. Link: compressed-tensors `compressors/base.py`. Versions: 0.19.
    """
    state: dict[str, torch.Tensor] = _compressor_of(module).compress(get_direct_state_dict(module), scheme_of(module))
    return state


def decode_state(module: nn.Module, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weight that a compressed state dict stands for, by compressed-tensors' own decompressor (BF16 arithmetic)."""
    weight: torch.Tensor = _compressor_of(module).decompress(state, scheme_of(module))["weight"]
    return weight
