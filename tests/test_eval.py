"""`dsv4q eval` against plain transformers and plain formulas: perplexity, divergence, drafts; what it refuses."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from artifact_maker import copy, edit_json, read
from dsv4q.data.tokens import load_tokenizer
from dsv4q.errors import CalibrationError, DataError, SourceError
from dsv4q.evaluation import pieces, scores
from dsv4q.evaluation import side as streams
from dsv4q.evaluation.data import DataRequest, load_data
from dsv4q.evaluation.drafts import propose
from dsv4q.evaluation.side import Side, open_side
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP
from dsv4q.verify.judge import verify
from eval_toys import changed, noise_like, pair, run_eval, write_counting_toy, write_exact_artifact
from stock import load
from test_end_to_end import GIVE_BACK, WIDE, command

MAIN_NOISE = "layers.4.ffn.shared_experts.w2.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose text the model knows, and whose draft is right most of the time."""
    return write_counting_toy(tmp_path_factory.mktemp("counting") / "source", draft_gain=0.4)


@pytest.fixture(scope="module")
def whole(source: Path) -> DeepseekV4ForCausalLMWithMTP:
    return load(source)


@pytest.fixture(scope="module")
def batches(source: Path) -> tuple[torch.Tensor, ...]:
    return load_data(DataRequest(None, 3, 48, 2), source, source, 512).batches


@pytest.fixture(scope="module")
def itself(source: Path) -> dict[str, Any]:
    return run_eval(source, source)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exact_artifact(tmp_path_factory.mktemp("grid"))


# ------------------------------------------------------------------------------------------------ nothing changed


def test_a_checkpoint_against_itself_diverges_by_nothing_at_all(itself: dict[str, Any]) -> None:
    assert itself["kl_divergence"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert itself["top1_agreement"]["value"] == 1.0
    assert itself["perplexity"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert {error["relative_error"] for error in itself["residual"]} == {0.0}


def test_a_native_checkpoint_is_the_bf16_one_that_it_stands_for(grid: Path, tmp_path: Path) -> None:
    write_toy(tmp_path / "native", form=native_form())
    result = run_eval(tmp_path / "native", grid / "source")
    assert result["kl_divergence"]["value"] == 0.0 and result["top1_agreement"]["value"] == 1.0
    assert result["artifact"]["form"] == "native" and result["emulated"] == {}


def test_an_exact_artifact_whose_inputs_are_not_rounded_is_its_source(
    grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "quantizer", lambda *_: None)
    result = run_eval(grid / "out", grid / "source")
    assert result["kl_divergence"]["value"] == 0.0
    assert sum(result["emulated"].values()) == 145


@pytest.mark.parametrize("form", ["bf16", "native"])
def test_tensors_read_together_and_experts_computed_together_change_no_figure(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    source = grid / "source" if form == "bf16" else write_toy(tmp_path / "native", form=native_form()).out
    together = run_eval(grid / "out", source)
    monkeypatch.setattr(Side, "_batch_experts", lambda *_: None)
    monkeypatch.setattr(pieces, "TOGETHER", {"cpu": 1})
    alone = run_eval(grid / "out", source)
    varying = ("seconds", "peak_memory")
    assert {k: v for k, v in together.items() if k not in varying} == {
        k: v for k, v in alone.items() if k not in varying
    }


def test_rounded_inputs_are_all_that_an_exact_artifact_loses(grid: Path) -> None:
    result = run_eval(grid / "out", grid / "source")
    errors = [error["relative_error"] for error in result["residual"]]
    assert errors[0] == 0 and all(0.01 < error < 0.5 for error in errors[1:])
    assert 0 < result["kl_divergence"]["low"] < result["kl_divergence"]["value"] < 1


# ------------------------------------------------------------------------------------------------ plain transformers


@torch.no_grad()
def test_perplexity_is_that_of_plain_transformers(
    itself: dict[str, Any], whole: DeepseekV4ForCausalLMWithMTP, batches: tuple[torch.Tensor, ...]
) -> None:
    nll = [
        F.cross_entropy(whole(ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        for ids in batches
    ]
    plain = math.exp(float(sum(nll)) / sum(ids[:, 1:].numel() for ids in batches))
    assert itself["perplexity"]["reference"]["value"] == pytest.approx(plain, rel=1e-5)
    assert plain < 10  # the toy knows its text, so that a shifted target would show


@torch.no_grad()
def test_divergence_is_that_of_two_plain_models(
    source: Path, tmp_path: Path, batches: tuple[torch.Tensor, ...]
) -> None:
    other = changed(source, tmp_path / "other", {MAIN_NOISE: noise_like(source, MAIN_NOISE, 3.0)})
    models = [load(source), load(other)]
    total = 0.0
    for ids in batches:
        p, q = (torch.log_softmax(model(ids).logits.double(), dim=-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
    result = run_eval(other, source)
    assert result["kl_divergence"]["value"] == pytest.approx(total / sum(ids.numel() for ids in batches), rel=1e-3)


def test_the_size_of_the_pieces_does_not_matter(
    source: Path, itself: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "CHUNK", 512 * 5)
    result = run_eval(source, source, micro_batch=3)
    for side in ("reference", "artifact"):
        expected = itself["perplexity"][side]["value"]
        assert result["perplexity"][side]["value"] == pytest.approx(expected, rel=1e-3)
    assert result["acceptance"]["pairs"][0]["counts"]["positions"] == 3 * 47


# ------------------------------------------------------------------------------------------------ drafts


@torch.no_grad()
def test_acceptance_of_one_step_is_that_of_the_whole_model(
    itself: dict[str, Any], whole: DeepseekV4ForCausalLMWithMTP, batches: tuple[torch.Tensor, ...]
) -> None:
    hits = 0
    for ids in batches:
        own = whole(ids).logits.argmax(dim=-1)
        drafted = whole.draft_logits(whole.residual_streams(ids)[:, :-1], ids[:, 1:]).argmax(dim=-1)
        hits += int((drafted == own[:, 1:]).sum())
    assert 0.2 < hits / (3 * 47) < 0.98
    assert pair(itself, "reference", "reference")["counts"]["accepted"] == hits


def draft_side(source: Path) -> Side:
    """The source with embedding, head and draft in memory."""
    side = open_side("reference", source, torch.device("cpu"))
    for block in ("embed", "head", "mtp.0"):
        for piece in side.pieces(block):
            side.install(piece, piece.load())
    return side


@torch.no_grad()
def test_the_second_step_is_the_draft_run_again_behind_each_position(
    source: Path, whole: DeepseekV4ForCausalLMWithMTP, batches: tuple[torch.Tensor, ...]
) -> None:
    ids = batches[0]
    main = whole.residual_streams(ids)
    first, second = propose(draft_side(source), 0, main, ids)
    own = whole.draft_streams(main[:, :-1], ids[:, 1:])
    for t in range(0, 47, 5):
        again = torch.cat([main[:, : t + 1], own[:, t : t + 1]], dim=1)
        tokens = torch.cat([ids[:, 1 : t + 2], first[:, t : t + 1]], dim=1)
        expected = whole.draft_logits(again, tokens)[:, -1].argmax(dim=-1)
        assert torch.equal(second[:, t], expected), t


def test_a_second_step_counts_where_the_first_was_accepted_and_is_the_text(itself: dict[str, Any]) -> None:
    found = pair(itself, "reference", "reference")
    counts = found["counts"]
    assert 0 < counts["accepted_2"] <= counts["positions_2"] <= counts["accepted"] < counts["positions"]
    a1, a2 = counts["accepted"] / counts["positions"], counts["accepted_2"] / counts["positions_2"]
    assert (found["step_1"]["value"], found["step_2"]["value"]) == pytest.approx((a1, a2))
    assert found["tokens_per_step"]["value"] == pytest.approx(1 + a1 + a1 * a2)


def test_a_spoiled_draft_lowers_acceptance_of_the_pairs_with_it_and_of_no_other(
    source: Path, itself: dict[str, Any], tmp_path: Path
) -> None:
    name = "mtp.0.e_proj.weight"
    result = run_eval(changed(source, tmp_path / "bad", {name: noise_like(source, name)}), source)
    good = pair(itself, "reference", "reference")
    for main in ("reference", "artifact"):
        assert pair(result, main, "reference")["counts"] == good["counts"]
        assert pair(result, main, "artifact")["step_1"]["value"] < 0.2 < good["step_1"]["value"]
    alone = result["acceptance"]["differences"]
    assert alone["artifact's draft alone"]["step_1"]["high"] < 0
    assert alone["artifact's main model alone"]["step_1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_spoiled_main_model_shows_with_either_draft(source: Path, itself: dict[str, Any], tmp_path: Path) -> None:
    name = "norm.weight"
    result = run_eval(changed(source, tmp_path / "bad", {name: noise_like(source, name, 2.0)}), source)
    good = pair(itself, "reference", "reference")["counts"]
    for draft in ("reference", "artifact"):
        assert pair(result, "reference", draft)["counts"] == good
        assert pair(result, "artifact", draft)["counts"]["accepted"] < good["accepted"]
    assert result["perplexity"]["ratio"]["low"] > 1


@pytest.mark.parametrize("declared", [0, 1])
def test_without_mtp_acceptance_is_none_and_all_else_is_there(source: Path, tmp_path: Path, declared: int) -> None:
    bare = changed(source, tmp_path / "bare", dict.fromkeys(n for n in read(source) if n.startswith("mtp.")))
    edit_json(bare, "config.json", lambda config: config.update(num_nextn_predict_layers=declared))
    result = run_eval(bare, source)
    assert result["kl_divergence"]["value"] == 0.0
    assert pair(result, "artifact", "artifact")["step_1"] == {"value": None, "low": None, "high": None}
    assert pair(result, "artifact", "reference")["step_1"]["value"] > 0.2
    assert result["acceptance"]["without_draft"] == {"artifact": "no mtp.* tensors"}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocab_size": 640}, "different vocabularies"), ({"moe_intermediate_size": 256}, "not forms of one model")],
)
def test_checkpoints_of_two_models_are_refused(
    source: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    write_toy(tmp_path / "other", replace(ToyConfig(), **change))
    with pytest.raises(SourceError, match=message):
        run_eval(tmp_path / "other", source)


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    name = "layers.2.ffn.experts.5.w2.weight"
    with pytest.raises(SourceError, match=f"{name} is missing"):
        run_eval(changed(source, tmp_path / "bad", {name: None}), source)


def test_a_tensor_that_the_quantization_config_does_not_describe_is_named(grid: Path, tmp_path: Path) -> None:
    name = "layers.1.attn.wkv.weight"
    bad = changed(grid / "out", tmp_path / "bad", {name: read(grid / "source")[name]})
    with pytest.raises(SourceError, match=f"{name} is BF16"):
        run_eval(bad, grid / "source")


def test_a_quantization_config_without_groups_is_refused(grid: Path, tmp_path: Path) -> None:
    bad = copy(grid / "out", tmp_path / "bad")
    edit_json(bad, "config.json", lambda config: config["quantization_config"].update(config_groups={}))
    with pytest.raises(SourceError, match="config_groups"):
        run_eval(bad, grid / "source")


@pytest.mark.parametrize("name", ["layers.1.attn_norm.weight", "mtp.0.enorm.weight", "head.weight"])
def test_a_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path, name: str) -> None:
    tensor = read(source)[name]
    tensor[0] = math.nan
    with pytest.raises(CalibrationError, match=name):
        run_eval(changed(source, tmp_path / "bad", {name: tensor}), source)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_an_input_scale_that_no_kernel_can_use_is_named(grid: Path, tmp_path: Path, value: float) -> None:
    name = "layers.3.ffn.experts.1.w2.input_global_scale"
    bad = changed(grid / "out", tmp_path / "bad", {name: torch.tensor([value])})
    with pytest.raises(SourceError, match=name):
        run_eval(bad, grid / "source")


def test_too_little_data_is_refused_in_the_words_of_the_command(source: Path) -> None:
    with pytest.raises(DataError, match="--samples or --length"):
        run_eval(source, source, samples=100, length=480)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    write_toy(small, replace(ToyConfig(), vocab_size=264))
    (small / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert load_tokenizer(small).get_vocab_size() > 264
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        run_eval(small, small)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_one_object_and_writes_nothing(grid: Path) -> None:
    before = sorted(p.name for p in (grid / "out").iterdir())
    line = ("eval", str(grid / "out"), "--reference", str(grid / "source"), "--device", "cpu", "--json")
    done = command(*line, "--samples", "2", "--length", "32", "--micro-batch", "2")
    result = json.loads(done.stdout)
    assert result["data"]["tokens"] == 64 and result["perplexity"]["artifact"]["value"] > 1
    assert sorted(p.name for p in (grid / "out").iterdir()) == before


def test_a_saved_result_lies_in_the_artifact_and_does_no_harm_there(grid: Path, tmp_path: Path) -> None:
    out = copy(grid / "out", tmp_path / "out")
    line = ("eval", str(out), "--reference", str(grid / "source"), "--device", "cpu", "--save")
    shown = command(*line, "--samples", "2", "--length", "32").stdout
    saved = json.loads((out / "eval.json").read_text())
    assert f"{saved['perplexity']['artifact']['value']:.5g}" in shown
    assert verify(out, source=grid / "source", deep=True, progress=None).ok


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, int]]:
    """Layers -> bytes of the largest block, peak bytes of a fresh process that evaluated the source against itself."""
    folder = tmp_path_factory.mktemp("memory")
    for layers in (4, 12):
        write_toy(folder / str(layers), replace(WIDE, compress_ratios=(0,) * layers))

    def peak(layers: int) -> int:
        where = str(folder / str(layers))
        line = ("eval", where, "--reference", where, "--device", "cpu", "--json")
        done = command(*line, "--samples", "2", "--length", "32", **GIVE_BACK)
        return int(json.loads(done.stdout)["peak_memory"]["host"])

    with ThreadPoolExecutor() as pool:
        found = dict(zip((4, 12), pool.map(peak, (4, 12)), strict=True))
    block = sum(t.nbytes for name, t in read(folder / "4").items() if name.startswith("layers.3."))
    return {layers: (block, bytes_) for layers, bytes_ in found.items()}


def test_peak_memory_does_not_grow_with_the_number_of_layers(peaks: dict[int, tuple[int, int]]) -> None:
    (block, small), (_, large) = peaks[4], peaks[12]
    assert block > 15e6
    assert large - small < 1.5 * block, f"{large - small:,} more for 2 x 8 blocks of {block:,}"
