"""A DeepSeek-V4 with MTP that can be trained: transformers' modules, but for the experts and the Sinkhorn iteration.

Those two compute the same function with fewer kernels: experts as two matrix products over all of them, weighted with
the routing (zero where an expert was not chosen); Sinkhorn with a backward of its own. Weights are F32; on a GPU the
products run in BF16, as the finished model's do.

Shape letters: B batch, S sequence, T tokens (B * S), E experts, I expert width, D hidden_size, C hc_mult, N compressed
entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4TopKRouter

from dsv4q.checkpoint.native import MXFP4, release_form
from dsv4q.layout import HF_PROJECTION, Role, TensorSpec, source_tensors
from dsv4q.made_up.toy import ToyConfig, random_values
from dsv4q.model.model import (
    BlockInputs,
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    build_meta_model,
    embed,
    rebuild_rotary,
    set_tensor,
)
from train_tiny_rounding import Rounding

DRAFT_WEIGHT = 0.3
INDEXER_WEIGHT = 1.0
"""Reaches the indexer alone, so it only scales that part's gradient."""


class StackedExperts(nn.Module):
    """All routed experts of a layer; the same function as transformers' `DeepseekV4Experts`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, width, hidden = config.num_local_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.act, self.limit = ACT2FN[config.hidden_act], config.swiglu_limit

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Tokens [T, D], chosen experts I64 [T, k] and their weights [T, k] -> [T, D]."""
        gate_up, down = self.gate_up, self.down
        experts = gate_up.shape[0]
        dense = weights.new_zeros(hidden.shape[0], experts).scatter(1, indices, weights)
        both = (hidden @ gate_up.flatten(0, 1).T).unflatten(1, (experts, -1))
        gate, up = both.chunk(2, dim=-1)
        inner = self.act(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)
        inner = inner * dense.to(inner.dtype)[..., None]
        return inner.flatten(1) @ down.transpose(1, 2).flatten(0, 1)

    def weight(self, expert: int, projection: str) -> Tensor:
        """One expert's weight under its transformers name, F32."""
        if projection == "down_proj":
            return self.down[expert]
        gate, up = self.gate_up[expert].chunk(2)
        return gate if projection == "gate_proj" else up


class Sinkhorn(torch.autograd.Function):
    """Alternating division by row and column sums, as `DeepseekV4HyperConnection.forward` does it."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, iterations: int, eps: float) -> Tensor:
        """[..., C, C], positive -> nearly doubly stochastic."""
        sums, results = [], []
        for dim in [-2, *[-1, -2] * (iterations - 1)]:
            sums.append(matrix.sum(dim, keepdim=True).add_(eps))
            matrix = matrix / sums[-1]
            results.append(matrix)
        ctx.save_for_backward(*sums, *results)
        return matrix

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        count = len(ctx.saved_tensors) // 2
        sums, results = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        for step in reversed(range(count)):
            dim = -2 if step % 2 == 0 else -1
            along = (gradient * results[step]).sum(dim, keepdim=True)
            gradient = (gradient - along) / sums[step]
        return gradient, None, None


class HyperConnection(DeepseekV4HyperConnection):
    """transformers' module in F32 also under autocast, with `Sinkhorn`."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [B, S, C, D] -> post [B, S, C], comb [B, S, C, C], collapsed [B, S, D]."""
        hc = self.hc_mult
        with torch.autocast(hidden_streams.device.type, enabled=False):
            flat = self.input_norm(hidden_streams.flatten(start_dim=2).float())
            mixes = functional.linear(flat, self.fn)
            pre_w, post_w, comb_w = mixes.split([hc, hc, hc * hc], dim=-1)
            pre_b, post_b, comb_b = self.base.split([hc, hc, hc * hc])
            pre = torch.sigmoid(pre_w * self.scale[0] + pre_b) + self.hc_eps
            post = 2 * torch.sigmoid(post_w * self.scale[1] + post_b)
            comb = torch.softmax((comb_w * self.scale[2] + comb_b).unflatten(-1, (hc, hc)), dim=-1) + self.hc_eps
            comb = Sinkhorn.apply(comb, self.hc_sinkhorn_iters, self.hc_eps)  # type: ignore[no-untyped-call]
            collapsed = (pre.unsqueeze(-1) * hidden_streams).sum(dim=2)
        return post, comb, collapsed


def build(toy: ToyConfig, seed: int, device: torch.device) -> DeepseekV4ForCausalLMWithMTP:
    """A model to train, F32, initialised as a function of the seed and the tensors' names alone."""
    model = build_meta_model(toy.as_config_json(), "tiny")
    with torch.device("meta"):
        for layer in blocks(model):
            layer.mlp.experts = StackedExperts(model.config)
            layer.attn_hc, layer.ffn_hc = HyperConnection(model.config), HyperConnection(model.config)
    for spec in source_tensors(toy.dims):
        if spec.role != Role.ROUTED_EXPERT:
            set_tensor(model, spec.hf_name, _initial(spec, toy, seed).to(device))
    for layer in blocks(model):
        layer.mlp.experts.to_empty(device=device)
    for spec in source_tensors(toy.dims):
        if spec.role == Role.ROUTED_EXPERT:
            with torch.no_grad():
                of_model(model, spec).copy_(_initial(spec, toy, seed))
    rebuild_rotary(model, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        assert parameter.dtype == torch.float32 and not parameter.is_meta, name
    for layer in csa_layers(model):
        # The indexer learns to name what attention looks at; it must not pull the rest of the model towards that.
        layer.self_attn.compressor.indexer.register_forward_pre_hook(
            lambda _, args: (args[0].detach(), args[1].detach(), *args[2:])
        )
    _add_rounding(model, toy)
    return model.train()


def blocks(model: DeepseekV4ForCausalLMWithMTP) -> Iterator[Any]:
    """Main layers and MTP layers."""
    yield from model.model.layers
    yield from model.mtp


def csa_layers(model: DeepseekV4ForCausalLMWithMTP) -> list[Any]:
    return [layer for layer in blocks(model) if hasattr(layer.self_attn.compressor, "indexer")]


def of_model(model: nn.Module, spec: TensorSpec) -> Tensor:
    """The tensor of the model that becomes a checkpoint's tensor: F32 or I64, rounded if rounding is on."""
    path, _, leaf = spec.hf_name.rpartition(".")
    if spec.role != Role.ROUTED_EXPERT:
        found: Tensor = getattr(model.get_submodule(path), leaf)
        return found
    stack, _, place = path.partition(".experts.")
    expert, projection = place.split(".")
    assert projection in HF_PROJECTION.values()
    experts: Any = model.get_submodule(f"{stack}.experts")
    return experts.weight(int(expert), projection)


def _initial(spec: TensorSpec, toy: ToyConfig, seed: int) -> Tensor:
    """Norms 1; hyper-connections that keep the streams apart and read their mean; linears that keep the variance."""
    dims, (kind, leaf) = toy.dims, spec.name.rsplit(".", 1)[-2:] if "." in spec.name else ("", spec.name)
    if leaf == "tid2eid":
        return random_values(spec, dims, seed)
    if spec.name.endswith("norm.weight"):
        return torch.ones(spec.shape)
    if leaf in ("attn_sink", "bias", "ape"):
        return torch.zeros(spec.shape)
    if leaf.endswith("_scale"):
        return torch.full(spec.shape, 0.3)
    if leaf.endswith("_base"):
        streams = dims.hc_mult
        read, write = torch.full((streams,), math.log(1 / (streams - 1))), torch.zeros(streams)
        keep = 2 * torch.eye(streams).flatten()
        return read if leaf == "hc_head_base" else torch.cat([read, write, keep])
    noise = random_values(spec, dims, seed).float()
    noise = noise / noise.std()
    if spec.role == Role.EMBEDDING:
        return noise * 0.3
    if spec.role == Role.HEAD or leaf.endswith("_fn"):
        return noise * 0.02
    out = kind.endswith(("wo_b", "w2"))
    return noise / math.sqrt(spec.shape[-1]) / (math.sqrt(2 * (dims.layers + dims.draft.stages)) if out else 1)


def _add_rounding(model: DeepseekV4ForCausalLMWithMTP, toy: ToyConfig) -> None:
    """Rounding, still off, on all that the official release stores as MXFP4 or FP8."""
    for layer in blocks(model):
        for name in ("gate_up", "down"):
            parametrize.register_parametrization(layer.mlp.experts, name, Rounding(MXFP4), unsafe=True)
    for spec in source_tensors(toy.dims):
        form = release_form(spec)
        if form is not None and spec.role != Role.ROUTED_EXPERT:
            module = model.get_submodule(spec.hf_name.rpartition(".")[0])
            parametrize.register_parametrization(module, "weight", Rounding(form), unsafe=True)


def set_rounding(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, Rounding):
            module.on = on


# ------------------------------------------------------------------------------------------ forward


@dataclass
class Losses:
    main: Tensor
    """Mean cross-entropy of the next token, in nats."""
    draft: Tensor
    """The same of the MTP layer and the token after that."""
    indexer: Tensor
    """KL divergence of the indexers' scores from what attention looks at, mean over layers."""
    agreement: Tensor
    """How often the draft's first choice is the main model's."""

    @property
    def total(self) -> Tensor:
        return self.main + DRAFT_WEIGHT * self.draft + INDEXER_WEIGHT * self.indexer


class Watch:
    """What a forward pass leaves behind for the router's balance and the indexer's loss, by hooks."""

    def __init__(self, model: DeepseekV4ForCausalLMWithMTP) -> None:
        self.model = model
        self.routers = [m for m in model.modules() if isinstance(m, DeepseekV4TopKRouter)]
        self.chosen: dict[nn.Module, Tensor] = {}
        """Router -> F32 [E], tokens of each expert in the last forward."""
        self._scores: dict[nn.Module, Tensor] = {}
        self._attention: dict[nn.Module, Tensor] = {}
        for router in self.routers:
            router.register_forward_hook(self._see_router)
        for layer in csa_layers(model):
            attention = layer.self_attn
            attention.register_forward_hook(self._keeper(self._attention, attention, 1))
            attention.compressor.indexer.scorer.register_forward_hook(self._keeper(self._scores, attention, None))

    def _see_router(self, router: nn.Module, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        flat = out[2].flatten()
        counts = torch.zeros(out[0].shape[-1], device=flat.device)
        self.chosen[router] = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))

    @staticmethod
    def _keeper(store: dict[nn.Module, Tensor], key: nn.Module, part: int | None) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, out: Any) -> None:
            store[key] = out if part is None else out[part]

        return keep

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Raise the bias of experts with fewer tokens than the mean, lower the others' (DeepSeek-V3, section 2.1.2)."""
        for router in self.routers:
            counts = self.chosen[router]
            router.e_score_correction_bias.add_(torch.sign(counts.mean() - counts), alpha=rate)

    def indexer_loss(self, length: int) -> Tensor:
        """KL(attention over the chosen compressed entries || softmax of their scores), as for DeepSeek-V3.2's indexer.

        Attention is the sum over heads, normalised; positions that see no compressed entry do not count.
        """
        found = []
        for attention, scores in self._scores.items():
            target = self._attention[attention].detach()[..., length:].float().sum(1)
            total = target.sum(-1, keepdim=True)
            seen = total.squeeze(-1) > 1e-6
            target = target / total.clamp_min(1e-6)
            log_scores = scores.float().masked_fill(target <= 0, -1e4).log_softmax(-1)
            divergence = (target * (target.clamp_min(1e-9).log() - log_scores)).sum(-1)
            found.append((divergence * seen).sum() / seen.sum().clamp_min(1))
        return torch.stack(found).mean() if found else torch.zeros((), device=self.model.lm_head.weight.device)


def run(model: DeepseekV4ForCausalLMWithMTP, watch: Watch, ids: Tensor, inputs: BlockInputs) -> Losses:
    """Forward of main model and draft.

    Args:
        ids: I64 [B, S + 2]; the main model sees the first S and predicts one on, the draft two on.
        inputs: `block_inputs` of [B, S].
    """
    length = ids.shape[1] - 2
    given, following, second = ids[:, :length], ids[:, 1 : length + 1], ids[:, 2:]
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type != "cpu"):
        streams = embed(model, given)
        for layer in model.model.layers:
            streams = layer(streams, input_ids=given, **inputs)
        logits = model.lm_head(model.model.norm(model.model.hc_head(streams)))
        draft: Any = model.mtp[0]
        drafted = draft(streams, model.model.embed_tokens(following), following, **inputs)
        draft_logits = model.lm_head(draft.norm(draft.hc_head(drafted)))
    return Losses(
        functional.cross_entropy(logits.float().flatten(0, 1), following.flatten()),
        functional.cross_entropy(draft_logits.float().flatten(0, 1), second.flatten()),
        watch.indexer_loss(length),
        (draft_logits[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)).float().mean(),
    )


def inputs_for(model: DeepseekV4ForCausalLMWithMTP, batch: int, length: int) -> BlockInputs:
    """Positions, rotary and mask of every batch of this shape."""
    ids = torch.zeros(batch, length, dtype=torch.int64, device=model.lm_head.weight.device)
    return block_inputs(model, ids)
