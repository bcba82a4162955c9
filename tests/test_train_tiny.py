"""scripts/train_tiny.py at its least width: that it trains, rounds and writes what dsv4q reads, not how well."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dsv4q.checkpoint.native import FP8, MXFP4, forms_of, open_source
from dsv4q.config import load_config
from dsv4q.console import Console, Mode
from dsv4q.dequantize import Dequantization as DequantizeJob
from dsv4q.dequantize import dequantize
from dsv4q.errors import OutputError
from dsv4q.formats.native import fp8_to_bf16, mxfp4_to_bf16
from dsv4q.layout import source_tensors
from dsv4q.made_up.toy import train_tokenizer
from dsv4q.model.model import build_meta_model, rebuild_rotary, set_tensor
from dsv4q.quantize import Job
from runs import CONFIGS, run

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import corpus  # noqa: E402
import train_tiny  # noqa: E402
import train_tiny_finish  # noqa: E402
import train_tiny_model as tiny  # noqa: E402
from train_tiny_finish import built_beside  # noqa: E402
from train_tiny_rounding import LARGEST, encoded, rounded  # noqa: E402

SETTINGS = ("--width", "least", "--batch", "2", "--length", "256", "--conversations", "1500", "--samples", "2")
CORPUS_DIGEST = "d9c42ad2ebc0f6490d67fca2a34108100299d2d7be6bd5e38d593e6405b476e2"
"""Of the first 200 conversations of seed 0."""


def train(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "train_tiny.py"), "--out", str(out), "--device", "cpu", *SETTINGS, *more]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three steps, the last of them with rounded weights."""
    out = tmp_path_factory.mktemp("tiny") / "model"
    done = train(out, "--steps", "3")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny.build(train_tiny.WIDTHS["least"], 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def losses(model: Any) -> tuple[torch.Tensor, tiny.Losses]:
    ids = torch.randint(7, 512, (2, 258), generator=torch.Generator().manual_seed(1))
    watch = tiny.Watch(model)
    return ids, tiny.run(model, watch, ids, tiny.inputs_for(model, 2, 256))


def test_the_files_are_in_the_official_layout(trained: Path) -> None:
    with open_source(trained) as source:
        forms = forms_of(source)
        assert source.config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert set(forms) == {"MXFP4", "FP8", "BF16", "F32", "I64"}
    assert forms["MXFP4"] == (3 + 1) * 4 * 3


def test_the_files_quantize_without_any_error(trained: Path, tmp_path: Path) -> None:
    config = load_config(CONFIGS / "toy.yaml")
    report = run(Job(trained, tmp_path / "out", config, device="cpu"))
    for role in ("routed expert", "attention projection"):
        assert report["errors"][role]["exact"] == report["errors"][role]["tensors"] > 0


def test_the_files_dequantize_to_what_was_trained(trained: Path, tmp_path: Path) -> None:
    dequantize(DequantizeJob(trained, tmp_path / "bf16"), Console(Mode.QUIET))
    with open_source(trained) as native, open_source(tmp_path / "bf16") as plain:
        name = "layers.1.ffn.experts.2.w2.weight"
        assert bytes(plain.read(name)) == bytes(native.read(name))
        assert float(native.tensor(name).float().std()) > 0


def test_the_model_card_has_the_figures(trained: Path) -> None:
    text = (trained / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: mit\n")
    for row in ("perplexity", "perplexity of the unigram model", "MTP top-1 acceptance, 1 step"):
        assert f"| {row} | " in text


def test_no_held_out_conversation_is_for_calibration(trained: Path) -> None:
    rows = {name: (trained / name).read_text().splitlines() for name in ("chat_samples.jsonl", "heldout.jsonl")}
    held_out = [json.loads(row)["messages"] for row in rows["heldout.jsonl"]]
    assert len(held_out) > 20 and all(corpus.is_held_out(messages) for messages in held_out)
    assert not any(corpus.is_held_out(json.loads(row)["messages"]) for row in rows["chat_samples.jsonl"])


def test_a_run_whose_time_is_over_still_ends_with_rounded_weights(tmp_path: Path) -> None:
    done = train(tmp_path / "model", "--steps", "1000", "--minutes", "0.0001")
    assert done.returncode == 0, done.stderr
    assert "with rounded weights" in done.stdout
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = train(tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_the_texts_alone_need_no_training(tmp_path: Path) -> None:
    assert train(tmp_path / "texts", "--data-only").returncode == 0
    names = {file.name for file in (tmp_path / "texts").iterdir()}
    assert names == {"tokenizer.json", "chat_samples.jsonl", "heldout.jsonl", "LICENSE"}


def test_the_tokenizer_in_out_is_the_trained_one(trained: Path) -> None:
    training, _ = corpus.split(0, 1500)
    assert (trained / "tokenizer.json").read_text(encoding="utf-8") == train_tokenizer(training, 512)


def refused(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> str:
    """What the script, run in this process without its training, ends with."""
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--out", str(out), "--device", "cpu", *SETTINGS, *more])
    monkeypatch.setattr(train_tiny.Schedule, "stop_on_signals", lambda self: None)
    monkeypatch.setattr(train_tiny.Trainer, "train", lambda self, schedule: train_tiny.Trained(1, 0, 0.1))
    with pytest.raises(SystemExit) as stopped:
        train_tiny.main()
    return str(stopped.value)


def test_a_checkout_without_license_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_tiny_finish, "LICENSE", tmp_path / "LICENSE")
    monkeypatch.setattr(train_tiny, "make_texts", lambda *_: pytest.fail("the work began"))
    assert "license is not there" in refused(monkeypatch, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "There is no such device" in refused(monkeypatch, tmp_path / "model", "--device", "cuda:99")
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_that_is_too_short_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_tiny, "build", lambda *_: pytest.fail("the training began"))
    found = refused(monkeypatch, tmp_path / "model", "--samples", "999")
    assert "too little held-out text" in found and "raise --conversations" in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
def test_after_a_failure_in_the_middle_out_is_as_it_was(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    if there:
        out.mkdir()
    seen: list[tuple[bool, bool]] = []

    def failing(folder: Path, *_: object) -> None:
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        is_trained = tokenizer == train_tokenizer(corpus.split(0, 1500)[0], 512)
        seen.append((is_trained, out.exists() and any(out.iterdir())))
        raise SystemExit("in the middle")

    monkeypatch.setattr(train_tiny, "judge", failing)
    assert refused(monkeypatch, out) == "in the middle"
    assert seen == [(True, False)]
    assert [*tmp_path.rglob("*")] == ([out] if there else [])


def test_a_finished_model_is_kept_when_somebody_has_taken_its_place(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(OutputError, match="has been taken") as error, built_beside(out) as folder:
        (folder / "weights").touch()
        out.mkdir()
        (out / "mine").touch()
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert error.value.hint is not None and (folder / "weights").is_file() and str(folder) in error.value.hint


def test_the_corpus_is_the_same_on_every_python() -> None:
    text = json.dumps([corpus.conversation(0, number) for number in range(200)])
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_DIGEST


@pytest.mark.parametrize("on", [False, True])
def test_the_model_to_train_computes_what_transformers_does(model: Any, on: bool) -> None:
    tiny.set_rounding(model, on)
    ids = torch.randint(7, 512, (1, 258), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = tiny.run(model, tiny.Watch(model), ids, tiny.inputs_for(model, 1, 256))
        stock = build_meta_model(train_tiny.WIDTHS["least"].as_config_json(), "stock")
        for spec in source_tensors(train_tiny.WIDTHS["least"].dims):
            set_tensor(stock, spec.hf_name, tiny.of_model(model, spec).clone())
        rebuild_rotary(stock, "cpu")
        streams = stock.residual_streams(ids[:, :256])
        logits = stock.lm_head(stock.model.norm(stock.model.hc_head(streams)))
        draft = stock.draft_logits(streams, ids[:, 1:257])
    tiny.set_rounding(model, False)
    assert float(functional.cross_entropy(logits[0], ids[0, 1:257])) == pytest.approx(float(found.main), abs=1e-5)
    assert float(functional.cross_entropy(draft[0], ids[0, 2:])) == pytest.approx(float(found.draft), abs=1e-5)


def test_every_weight_gets_a_gradient(model: Any, losses: tuple[torch.Tensor, tiny.Losses]) -> None:
    model.zero_grad()
    losses[1].total.backward(retain_graph=True)
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


def test_the_indexer_learns_from_its_own_loss_alone(model: Any, losses: tuple[torch.Tensor, tiny.Losses]) -> None:
    model.zero_grad()
    losses[1].indexer.backward(retain_graph=True)
    taught = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert taught and all(".indexer." in name for name in taught)


def test_the_routers_bias_goes_to_experts_with_few_tokens(model: Any) -> None:
    watch = tiny.Watch(model)
    router = watch.routers[0]
    watch.chosen = {one: torch.tensor([9.0, 1.0, 5.0, 5.0]) for one in watch.routers}
    before = router.e_score_correction_bias.clone()
    watch.balance(0.5)
    assert (router.e_score_correction_bias - before).tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_sinkhorns_gradient_is_that_of_its_forward() -> None:
    matrix = torch.rand(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: tiny.Sinkhorn.apply(m, 5, 1e-6), (matrix,))


@pytest.mark.parametrize(("form", "decode"), [(MXFP4, mxfp4_to_bf16), (FP8, fp8_to_bf16)])
def test_the_codes_stand_for_the_rounded_weights(form: str, decode: Any) -> None:
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 1, 192)[:, None]
    weight[:128, :128] = 0
    assert torch.equal(decode(*encoded(weight, form)).float(), rounded(weight, form))


@pytest.mark.parametrize(("form", "steps"), [(MXFP4, 1.0), (FP8, 16.0)])
def test_rounding_goes_to_the_nearest_value_and_clips_nothing(form: str, steps: float) -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
    block = weight.abs().amax() if form == FP8 else weight.abs().view(128, 4, 32).amax(-1).repeat_interleave(32, 1)
    scale = torch.exp2(torch.ceil(torch.log2(block / LARGEST[form])))
    assert bool(((rounded(weight, form) - weight).abs() <= steps * scale).all())
    assert torch.equal(rounded(rounded(weight, form), form), rounded(weight, form))
