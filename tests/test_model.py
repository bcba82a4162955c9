"""The model with MTP: names and bytes, its draft against plain formulas, and block by block against whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV4Config
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dsv4q.errors import SourceError
from dsv4q.layout import Dims, source_tensors
from dsv4q.model.model import (
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    build_meta_model,
    embed,
    rebuild_rotary,
    release,
    run_block,
    set_tensor,
    upstream_names,
)
from stock import as_bytes, assert_same_tensors, load, tiny_config, write_tiny

Tensors = dict[str, torch.Tensor]
DIMS = Dims.from_config(tiny_config())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder)


@pytest.fixture(scope="module")
def whole(tiny: tuple[Path, Tensors]) -> DeepseekV4ForCausalLMWithMTP:
    return load(tiny[0])


def token_ids(batch: int = 2, length: int = 160, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, DIMS.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_streams(batch: int = 2, length: int = 48, seed: int = 2) -> torch.Tensor:
    shape = (batch, length, DIMS.hc_mult, DIMS.hidden)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ names, bytes


@pytest.mark.parametrize("mtp_layers", [0, 1, 2])
def test_load_and_save_give_the_same_bytes_under_the_same_names(tmp_path: Path, mtp_layers: int) -> None:
    tensors = write_tiny(tmp_path / "source", num_nextn_predict_layers=mtp_layers)
    load(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors, tmp_path / "saved")


def test_every_tensor_is_in_the_model_with_its_own_dtype_and_bytes(
    tiny: tuple[Path, Tensors], whole: DeepseekV4ForCausalLMWithMTP
) -> None:
    state, specs = whole.state_dict(), source_tensors(DIMS)
    assert sorted(state) == sorted(spec.hf_name for spec in specs)
    for spec in specs:
        expected, found = tiny[1][spec.name], state[spec.hf_name]
        assert expected.dtype == found.dtype, spec.name
        assert torch.equal(as_bytes(expected), as_bytes(found)), spec.name


def test_a_model_that_was_built_and_not_loaded_is_saved_under_upstream_names(
    tiny: tuple[Path, Tensors], tmp_path: Path
) -> None:
    model = build_meta_model(tiny_config(), str(tiny[0]))
    for spec in source_tensors(DIMS):
        set_tensor(model, spec.hf_name, tiny[1][spec.name])
    with upstream_names():
        model.save_pretrained(tmp_path)
    assert_same_tensors(tiny[1], tmp_path)


def test_draft_tensors_that_the_model_has_no_place_for_are_reported(tiny: tuple[Path, Tensors]) -> None:
    config = DeepseekV4Config.from_pretrained(tiny[0], num_nextn_predict_layers=0)
    with upstream_names():
        _, info = DeepseekV4ForCausalLMWithMTP.from_pretrained(tiny[0], config=config, output_loading_info=True)
    expected = {spec.hf_name for spec in source_tensors(DIMS) if spec.is_mtp}
    assert set(info["unexpected_keys"]) == expected and not info["missing_keys"]


def test_the_stock_name_mapping_is_back_after_the_context() -> None:
    before = repr(get_checkpoint_conversion_mapping("deepseek_v4"))
    with pytest.raises(RuntimeError, match="inside"), upstream_names():
        assert repr(get_checkpoint_conversion_mapping("deepseek_v4")) != before
        raise RuntimeError("inside")
    assert repr(get_checkpoint_conversion_mapping("deepseek_v4")) == before


# -------------------------------------------------------------------------------------------------- the meta model


def test_the_meta_model_has_the_layout_and_holds_no_memory() -> None:
    state = build_meta_model(tiny_config(), "somewhere").state_dict()
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    expected = {spec.hf_name: (dtypes[spec.dtype], spec.shape) for spec in source_tensors(DIMS)}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == expected
    assert all(tensor.is_meta for tensor in state.values())


def test_the_meta_model_is_in_eval_mode_without_gradients_and_knows_its_source() -> None:
    model = build_meta_model(tiny_config(), "somewhere")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.config.name_or_path, model.config._attn_implementation) == ("somewhere", "eager")


def test_the_quantization_of_the_source_is_not_in_the_models_config() -> None:
    config = tiny_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert getattr(build_meta_model(config, "somewhere").config, "quantization_config", None) is None


def test_a_config_that_does_not_speak_of_mtp_gives_a_model_without_it() -> None:
    config = tiny_config()
    del config["num_nextn_predict_layers"]
    assert len(build_meta_model(config, "somewhere").mtp) == 0


def test_building_leaves_torchs_default_dtype_alone_with_which_other_threads_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(_: torch.dtype) -> None:
        raise AssertionError("the default dtype is changed")

    monkeypatch.setattr(torch, "set_default_dtype", never)
    model = build_meta_model(tiny_config(), "somewhere")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16, torch.float32}


def test_a_tensor_that_the_model_does_not_have_is_refused_by_name() -> None:
    model = build_meta_model(tiny_config(), "somewhere")
    for name in ("model.layers.9.mlp.gate.weight", "mtp.0.embed", "model.layers.0.self_attn.compressor.ape"):
        with pytest.raises(SourceError, match=name):
            set_tensor(model, name, torch.zeros(1))


def test_a_tensor_of_another_shape_is_refused() -> None:
    model = build_meta_model(tiny_config(), "somewhere")
    with pytest.raises(SourceError, match="wrong shape"):
        set_tensor(model, "mtp.0.enorm.weight", torch.zeros(DIMS.hidden + 1))


def test_a_released_block_holds_nothing_and_keeps_its_dtypes(tiny: tuple[Path, Tensors]) -> None:
    block = load(tiny[0]).model.layers[1]
    before = {name: (tensor.dtype, tensor.shape) for name, tensor in block.state_dict().items()}
    release(block)
    after = block.state_dict()
    assert all(tensor.is_meta for tensor in after.values())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == before


def test_rebuilt_rotary_frequencies_are_those_of_a_loaded_model(whole: DeepseekV4ForCausalLMWithMTP) -> None:
    model = build_meta_model(tiny_config(), "somewhere")
    rebuild_rotary(model, "cpu")
    expected = {name: buffer for name, buffer in whole.named_buffers() if "inv_freq" in name}
    found = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert len(expected) > 4 and sorted(expected) == sorted(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# --------------------------------------------------------------------------------------------------- block by block


def stream_blocks(tensors: Tensors, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Streams after every block and the logits, with one block in memory at a time."""
    model = build_meta_model(tiny_config(), "somewhere")
    rebuild_rotary(model, "cpu")

    def fill(block: str) -> None:
        for spec in source_tensors(DIMS):
            if spec.block == block:
                set_tensor(model, spec.hf_name, tensors[spec.name])

    fill("embed")
    streams, outputs = embed(model, ids), []
    release(model.model.embed_tokens)
    inputs = block_inputs(model, ids)
    for layer in range(DIMS.layers):
        fill(f"layers.{layer}")
        streams = run_block(model, layer, streams, ids, inputs)
        outputs.append(streams)
        release(model.model.layers[layer])
    fill("head")
    return outputs, model.lm_head(model.model.norm(model.model.hc_head(streams)))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_one_block_at_a_time_gives_the_bits_of_the_whole_forward(
    tiny: tuple[Path, Tensors], whole: DeepseekV4ForCausalLMWithMTP, use_cache: bool
) -> None:
    expected: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *args: expected.append(args[2])) for layer in whole.model.layers]
    logits = whole(input_ids=token_ids(), use_cache=use_cache).logits
    for hook in hooks:
        hook.remove()
    found, found_logits = stream_blocks(tiny[1], token_ids())
    assert len(expected) == len(found) == DIMS.layers
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert torch.equal(logits, found_logits)


@torch.no_grad()
def test_residual_streams_are_those_of_the_models_own_forward(whole: DeepseekV4ForCausalLMWithMTP) -> None:
    seen: list[torch.Tensor] = []
    hook = whole.model.hc_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    whole(input_ids=token_ids(), use_cache=False)
    hook.remove()
    assert torch.equal(whole.residual_streams(token_ids()), seen[0])


# ---------------------------------------------------------------------------------------------------------- the draft


def rms(x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float, rope: int, sign: int = 1) -> torch.Tensor:
    """x [B, S, heads, H]: its last `rope` channels are pairs (re, im), turned by position * theta^(-2i/rope)."""
    angles = positions[:, None] * theta ** (-torch.arange(0, rope, 2) / rope)
    turn = torch.polar(torch.ones_like(angles), sign * angles)[None, :, None, :]
    pairs = torch.view_as_complex(x[..., -rope:].reshape(*x.shape[:-1], rope // 2, 2).contiguous())
    return torch.cat([x[..., :-rope], torch.view_as_real(pairs * turn).flatten(-2)], -1)


def hyper_connection(w: Tensors, site: str, streams: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]):
    """pre collapses the streams, post places the sublayer's output, a doubly stochastic matrix mixes the streams."""
    c = streams.shape[2]
    logits = rms(streams.flatten(2)) @ w[f"hc_{site}_fn"].T
    base, scale = w[f"hc_{site}_base"], w[f"hc_{site}_scale"]
    pre = torch.sigmoid(logits[..., :c] * scale[0] + base[:c]) + 1e-6
    post = 2 * torch.sigmoid(logits[..., c : 2 * c] * scale[1] + base[c : 2 * c])
    comb = (logits[..., 2 * c :] * scale[2] + base[2 * c :]).unflatten(-1, (c, c)).softmax(-1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    out = sublayer(torch.einsum("bsc,bscd->bsd", pre, streams))
    return torch.einsum("bsc,bsd->bscd", post, out) + torch.einsum("bsjc,bsjd->bscd", comb, streams)


def attention(w: Tensors, x: torch.Tensor, window: int, rope: int, groups: int) -> torch.Tensor:
    """One shared key-value head, a sink per head, output turned back and projected group by group."""
    x = rms(x, w["attn_norm.weight"])
    batch, length = x.shape[:2]
    heads, positions = len(w["attn.attn_sink"]), torch.arange(length)
    kv = rms(x @ w["attn.wkv.weight"].T, w["attn.kv_norm.weight"])
    q = rms(x @ w["attn.wq_a.weight"].T, w["attn.q_norm.weight"]) @ w["attn.wq_b.weight"].T
    q = rotate(rms(q.unflatten(-1, (heads, -1))), positions, 10000.0, rope)
    kv = rotate(kv.unsqueeze(2), positions, 10000.0, rope).squeeze(2)
    distance = positions[:, None] - positions[None, :]
    scores = torch.einsum("bihd,bjd->bhij", q, kv) / math.sqrt(kv.shape[-1])
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    sink = w["attn.attn_sink"][None, :, None, None].expand(batch, -1, length, 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    out = rotate(torch.einsum("bhij,bjd->bihd", weights, kv), positions, 10000.0, rope, sign=-1)
    low = torch.einsum("bsgi,gri->bsgr", out.flatten(2).unflatten(-1, (groups, -1)),
                       w["attn.wo_a.weight"].unflatten(0, (groups, -1)))  # fmt: skip
    return low.flatten(2) @ w["attn.wo_b.weight"].T


def swiglu(w: Tensors, prefix: str, x: torch.Tensor, limit: float) -> torch.Tensor:
    gate = (x @ w[f"{prefix}.w1.weight"].T).clamp(max=limit)
    up = (x @ w[f"{prefix}.w3.weight"].T).clamp(-limit, limit)
    return (F.silu(gate) * up) @ w[f"{prefix}.w2.weight"].T


def mixture(w: Tensors, x: torch.Tensor, top_k: int, limit: float) -> torch.Tensor:
    """The bias chooses experts and does not weigh them; weights sum to 1.5."""
    x = rms(x, w["ffn_norm.weight"])
    scores = F.softplus(x @ w["ffn.gate.weight"].T).sqrt()
    chosen = (scores + w["ffn.gate.bias"]).topk(top_k, -1).indices
    weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
    weights = 1.5 * weights / weights.sum(-1, keepdim=True)
    routed = sum(weights[..., e : e + 1] * swiglu(w, f"ffn.experts.{e}", x, limit) for e in range(scores.shape[-1]))
    return routed + swiglu(w, "ffn.shared_experts", x, limit)


def reference_draft(tensors: Tensors, config: dict, streams: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """Draft logits by the formulas, in F32, from upstream-named tensors; no module of the model."""
    w = {name.removeprefix("mtp.0."): tensor.float() for name, tensor in tensors.items() if name.startswith("mtp.0.")}
    embedded = rms(tensors["embed.weight"].float()[next_ids], w["enorm.weight"]) @ w["e_proj.weight"].T
    x = embedded[:, :, None, :] + rms(streams, w["hnorm.weight"]) @ w["h_proj.weight"].T
    window, rope, groups = config["sliding_window"], config["qk_rope_head_dim"], config["o_groups"]
    x = hyper_connection(w, "attn", x, lambda y: attention(w, y, window, rope, groups))
    x = hyper_connection(w, "ffn", x, lambda y: mixture(w, y, config["num_experts_per_tok"], config["swiglu_limit"]))
    pre = torch.sigmoid(rms(x.flatten(2)) @ w["hc_head_fn"].T * w["hc_head_scale"] + w["hc_head_base"]) + 1e-6
    hidden = rms(torch.einsum("bsc,bscd->bsd", pre, x), w["norm.weight"])
    return hidden @ tensors["head.weight"].float().T


@torch.no_grad()
@pytest.mark.parametrize("limit", [10.0, 0.3])
def test_the_draft_is_what_the_formulas_say(tmp_path: Path, limit: float) -> None:
    tensors = write_tiny(tmp_path, swiglu_limit=limit)
    streams, next_ids = random_streams(), token_ids(length=48)
    found = load(tmp_path).float().draft_logits(streams, next_ids)
    expected = reference_draft(tensors, tiny_config(swiglu_limit=limit), streams, next_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_draft_in_bf16_is_close_to_the_formulas(
    tiny: tuple[Path, Tensors], whole: DeepseekV4ForCausalLMWithMTP
) -> None:
    streams, next_ids = random_streams().bfloat16(), token_ids(length=48)
    found = whole.draft_logits(streams, next_ids)
    expected = reference_draft(tiny[1], tiny_config(), streams.float(), next_ids)
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert found.dtype == torch.bfloat16
    assert error.median() < 0.03  # a token may be routed otherwise where two scores are close


@torch.no_grad()
def test_the_draft_depends_on_the_next_token_from_its_position_on(whole: DeepseekV4ForCausalLMWithMTP) -> None:
    streams, ids = random_streams().bfloat16(), token_ids(length=48)
    other = ids.clone()
    other[:, 20] = (ids[:, 20] + 1) % DIMS.vocab
    same = (whole.draft_logits(streams, ids) == whole.draft_logits(streams, other)).all(-1).all(0)
    assert same[:20].all() and not same[20]


@torch.no_grad()
def test_the_draft_depends_on_the_streams_from_their_position_on(whole: DeepseekV4ForCausalLMWithMTP) -> None:
    streams, ids = random_streams().bfloat16(), token_ids(length=48)
    other = streams.clone()
    other[:, 20, 3] += 1
    same = (whole.draft_logits(streams, ids) == whole.draft_logits(other, ids)).all(-1).all(0)
    assert same[:20].all() and not same[20]


@torch.no_grad()
def test_a_second_mtp_layer_drafts_from_the_streams_of_the_first(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path, num_nextn_predict_layers=2)
    model, streams, ids = load(tmp_path).float(), random_streams(), token_ids(length=48)
    second = {name.replace("mtp.1.", "mtp.0."): t for name, t in tensors.items() if not name.startswith("mtp.0.")}
    expected = reference_draft(second, tiny_config(), model.draft_streams(streams, ids, 0), ids)
    found = model.draft_logits(model.draft_streams(streams, ids, 0), ids, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
