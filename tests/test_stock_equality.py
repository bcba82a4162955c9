"""What stock llmcompressor makes of a checkpoint of ours: the yardstick of the streaming pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dsv4q.__main__ import main
from dsv4q.config import Config, DraftChoice, load_config, parse_config
from dsv4q.console import Console, Mode
from dsv4q.data.tokens import load_calibration, load_tokenizer
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.plan.small_files import carried_files
from dsv4q.quantize import Job, quantize
from dsv4q.run.calibration import data_wanted
from runs import CONFIGS
from stock import as_bytes, assert_same_tensors, run_stock, write_tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Tensors]:
    """Tensors of a tiny source and of what stock made of it, both under upstream names."""
    folder = tmp_path_factory.mktemp("stock")
    source = write_tiny(folder / "source")
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 512, (2, 160), generator=generator) for _ in range(2)]
    return source, run_stock(folder / "source", folder / "out", batches)


def test_stock_writes_upstream_names_in_the_dtypes_of_the_contract(stock_run: tuple[Tensors, Tensors]) -> None:
    _, made = stock_run
    expert = {"weight_packed": torch.uint8, "weight_scale": torch.float8_e4m3fn,
              "weight_global_scale": torch.float32, "input_global_scale": torch.float32}  # fmt: skip
    attention = {"weight": torch.float8_e4m3fn, "weight_scale": torch.bfloat16}
    for module, parts in (("layers.4.ffn.experts.7.w2", expert), ("layers.0.attn.wo_a", attention)):
        assert {n.removeprefix(f"{module}."): t.dtype for n, t in made.items() if n.startswith(f"{module}.")} == parts


def test_stock_quantizes_all_targets_and_no_other_tensor(stock_run: tuple[Tensors, Tensors]) -> None:
    source, made = stock_run
    changed = {
        name
        for name, tensor in source.items()
        if name not in made
        or tensor.dtype != made[name].dtype
        or not torch.equal(as_bytes(tensor), as_bytes(made[name]))
    }
    experts = {n for n in source if n.startswith("layers.") and ".experts." in n}
    attention = {f"layers.{i}.attn.{p}.weight" for i in range(5) for p in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")}
    assert changed == experts | attention


def test_stock_gives_both_halves_of_an_expert_the_same_global_scales(stock_run: tuple[Tensors, Tensors]) -> None:
    _, made = stock_run
    for name, tensor in made.items():
        if ".w1." in name and name.endswith("global_scale"):
            assert torch.equal(tensor, made[name.replace(".w1.", ".w3.")]), name
            assert torch.isfinite(tensor).all() and (tensor > 0).all(), name


@pytest.mark.parametrize("config_name", ["nvfp4-fp8-mtp-minmax", "w4a16-fp8-mtp"])
def test_the_streaming_artifact_is_what_stock_writes_bit_for_bit(tmp_path: Path, config_name: str) -> None:
    job = toy_job(tmp_path, config_name)
    quantize(job, Console(Mode.QUIET))
    stock = run_stock(job.source, tmp_path / "stock", calibration_batches(job), yaml.safe_dump(job.config.recipe))
    assert_same_tensors(stock, job.out)


def test_stock_with_our_observers_finds_the_scales_that_the_batched_pipeline_finds(tmp_path: Path) -> None:
    job = toy_job(tmp_path, "nvfp4-fp8-mtp")
    recipe = load_config(CONFIGS / "nvfp4-fp8-mtp.yaml").recipe
    plain = {"recipe": recipe, "activations": {"headroom": 1.0}}  # stock knows no headroom
    job = replace(job, config=parse_config({**job.config.model_dump(mode="json"), **plain}))
    assert job.config.groups["experts"].weights.observer == "exact_nvfp4"
    quantize(job, Console(Mode.QUIET))
    stock = run_stock(job.source, tmp_path / "stock", calibration_batches(job), yaml.safe_dump(job.config.recipe))
    assert_same_tensors(stock, job.out)


@pytest.mark.parametrize("config_name", ["nvfp4-fp8-mtp-minmax", "w4a16-fp8-mtp"])
def test_the_judge_finds_nothing_wrong_with_stocks_own_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config_name: str
) -> None:
    job, out = toy_job(tmp_path, config_name, ToyConfig(num_nextn_predict_layers=0)), tmp_path / "stock"
    run_stock(job.source, out, calibration_batches(job), yaml.safe_dump(job.config.recipe))
    for name in carried_files(job.source):  # which is left to whoever ships it, as the files' modes are
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copy(job.source / name, out / name)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(out), "--deep", "--source", str(job.source), "--device", "cpu", "--json"])
    assert (stopped.value.code or 0, json.loads(capsys.readouterr().out)["differences"]) == (0, [])


def toy_job(folder: Path, config_name: str, toy: ToyConfig | None = None) -> Job:
    """A toy source and a shipped config, without the copies of the shared head, which stock has no notion of."""
    write_toy(folder / "source", toy or ToyConfig())
    config = with_stock_observers(load_config(CONFIGS / f"{config_name}.yaml"))
    small = load_config(CONFIGS / "toy.yaml")
    changes = {"calibration": config.calibration and small.calibration, "draft": DraftChoice(shared_head_copies=False)}
    return Job(folder / "source", folder / "artifact", config.model_copy(update=changes))  # stock takes a GPU too


def with_stock_observers(config: Config) -> Config:
    """The same recipe with llmcompressor's default observers on the weights."""
    raw = config.model_dump(mode="json")
    groups = raw["recipe"]["quant_stage"]["quant_modifiers"]["QuantizationModifier"]["config_groups"]
    for group in groups.values():
        group["weights"].pop("observer", None)
    return parse_config(raw)


def calibration_batches(job: Job) -> list[torch.Tensor]:
    """The micro-batches that `quantize` uses; where it needs none, one batch for stock, which always wants data."""
    wanted = data_wanted(job.config, job.source)
    if wanted is None:
        return [torch.zeros((1, 8), dtype=torch.int64)]
    return list(load_calibration(wanted[0], load_tokenizer(job.source), wanted[1]).batches)
