"""The whole job on real files: a toy checkpoint in, an artifact out, and all that is promised of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from artifact_maker import copy, edit
from dsv4q.config import Config, parse_config
from dsv4q.data.tokens import load_calibration, load_tokenizer
from dsv4q.errors import CalibrationError
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.quantize import Job, prepare
from dsv4q.run.calibration import data_wanted
from dsv4q.verify.judge import verify
from runs import CONFIGS, finished_files, run, toy_job

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
EXPERTS = r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"
ATTENTION = r"re:model\.layers\.\d+\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"
SHARDS = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]

# ------------------------------------------------------------------------------------------------ the artifacts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, a toy checkpoint."""
    return toy_job(tmp_path_factory.mktemp("end_to_end")).source.parent


@pytest.fixture(scope="module")
def finished(base: Path) -> dict[str, tuple[Job, dict[str, Any]]]:
    """Shipped config -> its job and the report of its run."""
    jobs = {name: replace(toy_job(base, name, make=False), out=base / name) for name in NAMES}
    return {name: (job, run(job)) for name, job in jobs.items()}


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest, finished: dict[str, tuple[Job, dict[str, Any]]]) -> Job:
    return finished[request.param][0]


@pytest.fixture
def report(request: pytest.FixtureRequest, made: Job) -> dict[str, Any]:
    return json.loads((made.out / "report.json").read_text())


@pytest.fixture(scope="module")
def main_run(finished: dict[str, tuple[Job, dict[str, Any]]]) -> tuple[Job, dict[str, Any]]:
    """The published recipe, at the size of the toy."""
    return finished["nvfp4-fp8-mtp"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------------ every config


def test_the_verifier_passes_the_artifact_deep_and_against_the_source(made: Job) -> None:
    result = verify(made.out, source=made.source, deep=True, progress=None)
    assert [d.text() for d in result.differences] == []
    assert result.checks["bytes"] + result.checks["encoding"] > 250


def test_every_mtp_tensor_is_byte_identical_to_the_source(made: Job) -> None:
    before, after = tensors(made.source), tensors(made.out)
    draft = made.config.draft
    copies = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}
    kept = {name for name in before if name.startswith("mtp.")} | (copies.keys() if draft.experts is None else set())
    if draft.experts == "nvfp4":
        kept = {name for name in kept if ".experts." not in name}
        after = {name: tensor for name, tensor in after.items() if ".experts." not in name}
    assert len(kept) == (29 if draft.experts == "nvfp4" else 55)
    assert {name for name in after if name.startswith("mtp.")} == (kept if made.config.draft.keep else set())
    if made.config.draft.keep:
        assert all(same_bytes(before[copies.get(name, name)], after[name]) for name in kept)


def test_every_untouched_tensor_is_byte_identical_and_every_quantized_one_is_gone(made: Job) -> None:
    before, after = tensors(made.source), tensors(made.out)
    quantized = re.compile(r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.experts\.\d+\.w[123])\.weight")
    touched = {name for name in before if quantized.fullmatch(name)}
    untouched = {name for name in before if not name.startswith("mtp.")} - touched
    assert (len(touched), len(untouched)) == (145, 110)
    assert all(same_bytes(before[name], after[name]) for name in untouched)
    assert all(after[name].dtype == torch.float8_e4m3fn for name in touched & after.keys())


def test_config_json_keeps_every_key_of_the_source(made: Job) -> None:
    before, after = config_json(made.source), config_json(made.out)
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    if not made.config.draft.keep:
        assert (before.pop("num_nextn_predict_layers"), after.pop("num_nextn_predict_layers")) == (1, 0)
    assert after == before


def test_a_config_without_mtp_leaves_no_trace_of_it(finished: dict[str, tuple[Job, dict[str, Any]]]) -> None:
    out = finished["nvfp4-fp8"][0].out
    assert not [name for name in tensors(out) if "mtp" in name]
    assert config_json(out)["num_nextn_predict_layers"] == 0
    assert "mtp." not in (out / "model.safetensors.index.json").read_text()


def test_the_artifact_has_exactly_these_files_with_ordinary_permissions(made: Job) -> None:
    files = {str(path.relative_to(made.out)): path for path in made.out.rglob("*") if not path.is_dir()}
    assert sorted(files) == sorted(
        [*SHARDS, "model.safetensors.index.json", "config.json", "recipe.yaml", "report.json", "report.html",
         "README.md", "LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "encoding/README.md"]
    )  # fmt: skip
    assert {oct(path.stat().st_mode & 0o7777) for path in files.values()} == {"0o644"}
    assert not [path for path in files.values() if path.is_symlink()]


def test_tokenizer_encoding_and_license_are_carried_over_as_they_are(made: Job) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "encoding/README.md", "LICENSE"]
    assert all((made.out / name).read_bytes() == (made.source / name).read_bytes() for name in names)


def test_the_index_names_each_tensor_in_its_file_and_the_exact_size(made: Job) -> None:
    index = json.loads((made.out / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for file in SHARDS:
        with safe_open(made.out / file, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file)
    assert index["weight_map"] == found
    sizes = [tensor.nbytes for tensor in tensors(made.out).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


# ------------------------------------------------------------------------------------------------ purity


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Path -> mtime, mode and digest of everything in a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in [folder, *folder.rglob("*")]
    }


def test_nothing_outside_the_output_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(tmp_path / "disk")
    for name in ("cwd", "home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for variable, name in (("HOME", "home"), ("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "home")):
        monkeypatch.setenv(variable, str(tmp_path / name))
    job.out.mkdir()
    before = snapshot(tmp_path)
    run(job)
    inside = f"{job.out.relative_to(tmp_path)}"
    changed = {path for path, state in snapshot(tmp_path).items() if before.get(path) != state}
    assert len(changed) > 10
    assert [path for path in changed if not path.startswith(inside)] == []


def test_two_runs_give_the_same_bytes(main_run: tuple[Job, dict[str, Any]], tmp_path: Path) -> None:
    first = main_run[0]
    second = replace(first, out=tmp_path / "again")
    run(second)
    assert finished_files(second.out) == finished_files(first.out)
    for name in finished_files(first.out):
        assert (second.out / name).read_bytes() == (first.out / name).read_bytes(), name


def test_the_dry_run_has_the_plan_of_the_run_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    job = replace(toy_job(base, make=False), out=tmp_path / "out")
    before = snapshot(tmp_path)
    planned = prepare(job).as_dict()
    assert snapshot(tmp_path) == before
    report = run(job)
    assert (report["artifact"], report["source"]) == (planned["artifact"], planned["source"])


def test_the_dry_run_prints_the_same_object_as_plan(base: Path, tmp_path: Path) -> None:
    config = str(CONFIGS / "toy.yaml")
    source, out = str(base / "source"), str(tmp_path / "out")
    dry = command("quantize", source, out, "-c", config, "--dry-run", "--json")
    planned = command("plan", source, "-c", config, "--json")
    a, b = json.loads(dry.stdout), json.loads(planned.stdout)
    # free bytes are of another folder, at another moment
    assert a["needs"].pop("free_disk_bytes") > 0 < b["needs"].pop("free_disk_bytes")
    assert a == b
    assert not Path(out).exists()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dsv4q", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done


# ------------------------------------------------------------------------------------------------ the report


def test_report_has_the_time_of_each_block_and_a_digest(made: Job, report: dict[str, Any]) -> None:
    blocks = {block["block"]: block for block in report["blocks"]}
    expected = ["embed", *[f"layers.{i}" for i in range(5)], "head", *["mtp.0"] * made.config.draft.keep]
    assert list(blocks) == expected
    order = sorted(blocks, key=lambda name: blocks[name]["finished"])
    copied = [name for name in ("head", "mtp.0") if name in blocks and "errors" not in blocks[name]]
    assert order == ["embed", *copied, *(name for name in expected[1:] if name not in copied)]
    done = [blocks[name]["seconds"].pop("done_at") for name in order]
    assert done == sorted(done) and done[0] > 0
    assert all(sum(block["seconds"].values()) > 0 for block in blocks.values())
    assert report["seconds"]["blocks"] == pytest.approx(
        sum(sum(block["seconds"].values()) for block in blocks.values()), abs=0.01
    )


def test_report_digests_are_those_of_the_bytes_in_the_artifact(made: Job, report: dict[str, Any]) -> None:
    lines: dict[str, list[str]] = defaultdict(list)
    for name, tensor in sorted(tensors(made.out).items()):
        match = re.match(r"(layers|mtp)\.\d+", name)
        block = match[0] if match else "embed" if name.startswith("embed.") else "head"
        lines[block].append(f"{name} {hashlib.sha256(raw_bytes(tensor)).hexdigest()}\n")
    expected = {block: hashlib.sha256("".join(found).encode()).hexdigest() for block, found in lines.items()}
    assert {block["block"]: block["digest"] for block in report["blocks"]} == expected


def test_report_counts_each_token_of_each_expert_in_every_layer(made: Job, report: dict[str, Any]) -> None:
    layers = [block for block in report["blocks"] if block["block"].startswith("layers.")]
    assert len(layers) == 5
    if made.config.calibration is None:
        assert not any("tokens_per_expert" in block for block in layers)
        return
    counts = [block["tokens_per_expert"] for block in layers]
    assert {(len(c), sum(c)) for c in counts} == {(8, 8 * 128 * 2)}


def test_report_counts_of_a_hash_layer_are_those_of_its_table(main_run: tuple[Job, dict[str, Any]]) -> None:
    job, report = main_run
    wanted = data_wanted(job.config, job.source)
    assert wanted is not None
    ids = torch.cat(load_calibration(wanted[0], load_tokenizer(job.source), wanted[1]).batches)
    table = tensors(job.source)["layers.1.ffn.gate.tid2eid"]
    expected = torch.bincount(table[ids.reshape(-1)].reshape(-1), minlength=8)
    assert report["blocks"][2]["tokens_per_expert"] == expected.tolist()


def test_report_has_the_errors_of_each_class(made: Job, report: dict[str, Any]) -> None:
    errors = report["errors"]
    drafted = {"mtp: routed expert": 24} if made.config.draft.experts == "nvfp4" else {}
    assert {role: found["tensors"] for role, found in errors.items()} == {
        "routed expert": 120,
        "attention projection": 25,
        **drafted,
    }
    # random weights: 4 bits cannot be better than some per cent, nor 8 bits worse than 4
    assert 0.05 < errors["routed expert"]["relative_error"] < 0.15
    assert 0.01 < errors["attention projection"]["relative_error"] < 0.05
    assert all(0 < found["relative_error"] <= found["worst"] for found in errors.values())


def test_report_errors_are_those_that_the_verifier_finds(main_run: tuple[Job, dict[str, Any]]) -> None:
    job, report = main_run
    errors = verify(job.out, source=job.source, deep=False, progress=None).errors
    for role, said in report["errors"].items():
        assert said["worst"] == pytest.approx(errors[role]["max_relative_error"], rel=1e-3)


def test_report_has_peak_memory_versions_and_identity(report: dict[str, Any]) -> None:
    assert 100e6 < report["peak_memory"]["host"] < 4e9
    identity = report["identity"]
    assert identity["versions"].keys() >= {"dsv4q", "torch", "transformers", "llmcompressor", "compressed-tensors"}
    assert all(re.fullmatch("[0-9a-f]{64}", file["header_sha256"]) for file in identity["source"]["files"].values())
    assert identity["device"] == "cpu" and identity["config"]["draft"] is not None


def test_report_scales_are_those_in_the_artifact(main_run: tuple[Job, dict[str, Any]]) -> None:
    job, report = main_run
    found = tensors(job.out)
    layer = next(block for block in report["blocks"] if block["block"] == "layers.2")
    for name, said in layer["scales"].items():
        projection, suffix = name.split(".")
        values = [float(found[f"layers.2.ffn.experts.{e}.{projection}.{suffix}"]) for e in range(8)]
        assert (said["min"], said["max"]) == (min(values), max(values))


# ------------------------------------------------------------------------------------------------ small files


def test_model_card_has_the_serve_command_for_this_artifact(made: Job) -> None:
    card = (made.out / "README.md").read_text()
    assert "vllm serve ARTIFACT --tensor-parallel-size 1 --kv-cache-dtype fp8" in card
    speculative = """--speculative-config '{"method":"mtp","num_speculative_tokens":2}'"""
    assert (speculative in card) == made.config.draft.keep
    assert "--tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4" in card
    assert ("Native FP4 tensor cores need SM 10.x" in card) == ("w4a16" not in made.out.name)


def test_model_card_states_the_license_of_the_source(made: Job) -> None:
    text = (made.out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit"
    assert "That of the source: see [LICENSE](LICENSE)." in text


def test_recipe_yaml_is_one_that_llmcompressor_loads(made: Job) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.recipe import Recipe

    (modifier,) = Recipe.create_instance(str(made.out / "recipe.yaml")).modifiers
    assert isinstance(modifier, QuantizationModifier)
    assert set(modifier.resolved_config.config_groups) == {"attention", "experts"}


# ------------------------------------------------------------------------------------------------ other configs


def with_activations(base: Path, out: Path, *, samples: int = 8, length: int = 128, **activations: object) -> Job:
    job = replace(toy_job(base, make=False), out=out)
    chosen = job.config.calibration
    assert chosen is not None
    changes = {
        "activations": type(job.config.activations)(**activations),  # type: ignore[arg-type]
        "calibration": chosen.model_copy(update={"samples": samples, "max_length": length}),
    }
    return replace(job, config=job.config.model_copy(update=changes))


def test_headroom_two_halves_each_input_scale_exactly_and_changes_nothing_else(base: Path, tmp_path: Path) -> None:
    plain = with_activations(base, tmp_path / "plain")
    wide = with_activations(base, tmp_path / "wide", headroom=2.0)
    run(plain), run(wide)
    before, after = tensors(plain.out), tensors(wide.out)
    scales = [name for name in before if name.endswith("input_global_scale")]
    assert len(scales) == 120
    assert all(float(after[name]) == float(before[name]) / 2 for name in scales)
    assert all(same_bytes(before[name], after[name]) for name in before.keys() - set(scales))


@pytest.fixture(scope="module")
def starved(base: Path) -> tuple[Job, dict[str, Any]]:
    """Routed experts on eight tokens: some expert sees none."""
    job = with_activations(base, base / "starved", samples=1, length=8, experts="routed", fallback="layer_max")
    return job, run(job)


def test_experts_without_tokens_are_listed(starved: tuple[Job, dict[str, Any]]) -> None:
    coverage = {b["block"]: b for b in starved[1]["blocks"] if "tokens_per_expert" in b}
    assert len(coverage) == 5
    for block, record in coverage.items():
        unseen = [e for e, n in enumerate(record["tokens_per_expert"]) if n == 0]
        assert record["experts_without_tokens"] == unseen
        assert starved[1]["coverage"][block]["fallback"] == unseen
    assert any(record["experts_without_tokens"] for record in coverage.values())


def test_an_expert_without_tokens_takes_the_smallest_scale_of_its_layer(starved: tuple[Job, dict[str, Any]]) -> None:
    job, report = starved
    found = tensors(job.out)
    for layer, record in enumerate(report["blocks"][1:6]):
        unseen = record["experts_without_tokens"]
        for projection in ("w1", "w2", "w3"):
            scale = [float(found[f"layers.{layer}.ffn.experts.{e}.{projection}.input_global_scale"]) for e in range(8)]
            assert {scale[e] for e in unseen} <= {min(scale)}
            assert len(set(scale)) > 1
            assert all(math.isfinite(s) and s > 0 for s in scale)


def test_routed_experts_with_fallback_verify(starved: tuple[Job, dict[str, Any]]) -> None:
    job = starved[0]
    result = verify(job.out, source=job.source, deep=True, progress=None)
    assert [d.text() for d in result.differences] == []


def other(modifier: dict[str, Any], **more: Any) -> Config:
    recipe = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": {**modifier, "ignore": ["lm_head"]}}}}
    return parse_config({"recipe": recipe, "output": {"shards": 3}, **more})


FEW = {"calibration": {"dataset": "chat_samples.jsonl", "samples": 2, "max_length": 32, "micro_batch": 2}}
INT8_GROUP = {"targets": [EXPERTS], "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128}}
BOTH = {"NVFP4": [EXPERTS], "FP8_BLOCK": [ATTENTION]}
OTHER = {
    "presets for experts and attention": (other({"scheme": BOTH}, **FEW), 145, 0.11),
    "preset W8A16": (other({"scheme": {"W8A16": [EXPERTS]}}), 120, 0.01),
    "preset NVFP4A16": (other({"scheme": {"NVFP4A16": [EXPERTS]}}), 120, 0.11),
    "preset FP8_BLOCK on experts": (other({"scheme": {"FP8_BLOCK": [EXPERTS]}}), 120, 0.03),
    "INT8 in groups of 128": (other({"config_groups": {"experts": INT8_GROUP}}), 120, 0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_scheme_runs_and_verifies(name: str, base: Path, tmp_path: Path) -> None:
    config, linears, worst = OTHER[name]
    job = Job(base / "source", tmp_path / "out", config, device="cpu")
    report = run(job)
    result = verify(job.out, source=job.source, deep=True, progress=None)
    assert [d.text() for d in result.differences] == []
    assert sum(found["tensors"] for found in report["errors"].values()) == linears
    assert all(found["worst"] < worst for found in report["errors"].values())


FP8_WEIGHT_ONLY = {"targets": [EXPERTS], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
GENERAL = {
    "FP8_DYNAMIC": (other({"scheme": {"FP8_DYNAMIC": [EXPERTS]}}), "float-quantized", 0.03),
    "FP8": (other({"scheme": {"FP8": [EXPERTS]}}, **FEW), "float-quantized", 0.03),
    "FP8 weights only": (other({"config_groups": {"experts": FP8_WEIGHT_ONLY}}), "naive-quantized", 0.03),
    "W8A8": (other({"scheme": {"W8A8": [EXPERTS]}}), "int-quantized", 0.01),
    "MXFP4A16": (other({"scheme": {"MXFP4A16": [EXPERTS]}}), "mxfp4-pack-quantized", 0.12),
    "W3A16": (other({"scheme": {"W3A16": [EXPERTS]}}), "pack-quantized", 0.25),
    "W4A16_ASYM": (other({"scheme": {"W4A16_ASYM": [EXPERTS]}}), "pack-quantized", 0.12),
}
"""Schemes that only compressed-tensors knows -> config, format, worst relative error."""


@pytest.fixture(scope="module")
def general(base: Path) -> dict[str, Job]:
    jobs = {name: Job(base / "source", base / name, config, device="cpu") for name, (config, _, _) in GENERAL.items()}
    for job in jobs.values():
        run(job)
    return jobs


@pytest.mark.parametrize("name", GENERAL)
def test_a_scheme_that_only_compressed_tensors_knows_verifies(name: str, general: dict[str, Job]) -> None:
    _, form, worst = GENERAL[name]
    job = general[name]
    result = verify(job.out, source=job.source, deep=True, progress=None)
    assert [d.text() for d in result.differences] == []
    assert config_json(job.out)["quantization_config"]["format"] == form
    assert result.checks["encoding"] == result.checks["error"] == result.errors["routed expert"]["tensors"] == 120
    assert 0 < result.errors["routed expert"]["max_relative_error"] < worst


EXPERT = "layers.3.ffn.experts.5.w1"


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, "weight_scale") for name in GENERAL), ("W4A16_ASYM", "weight_zero_point")]
)
def test_a_damaged_byte_of_a_scale_is_found(name: str, suffix: str, general: dict[str, Job], tmp_path: Path) -> None:
    job, artifact = general[name], copy(general[name].out, tmp_path / "a")
    damaged = tensors(artifact)[f"{EXPERT}.{suffix}"]
    damaged.flatten().view(torch.uint8)[0] ^= 0x40 if damaged.dtype == torch.bfloat16 else 1
    edit(artifact, {f"{EXPERT}.{suffix}": damaged})
    result = verify(artifact, source=job.source, deep=True, progress=None)
    assert {(d.check, str(d.tensor).rpartition(".")[0]) for d in result.differences} == {("encoding", EXPERT)}


@pytest.mark.parametrize("name", GENERAL)
def test_swapped_experts_of_any_scheme_are_found(name: str, general: dict[str, Job], tmp_path: Path) -> None:
    job, artifact, other_one = general[name], copy(general[name].out, tmp_path / "a"), "layers.3.ffn.experts.6.w1"
    stored = tensors(artifact)
    suffixes = [found.removeprefix(EXPERT) for found in stored if found.startswith(f"{EXPERT}.")]
    swapped = {f"{a}{s}": stored[f"{b}{s}"] for a, b in ((EXPERT, other_one), (other_one, EXPERT)) for s in suffixes}
    edit(artifact, swapped)
    result = verify(artifact, source=job.source, deep=True, progress=None)
    assert {(d.check, str(d.tensor).rpartition(".")[0]) for d in result.differences} >= {
        ("encoding", EXPERT),
        ("encoding", other_one),
    }
    assert result.errors["routed expert"]["max_relative_error"] > 1


def test_an_impossible_scale_of_another_scheme_is_named(general: dict[str, Job], tmp_path: Path) -> None:
    artifact = copy(general["MXFP4A16"].out, tmp_path / "a")
    scale = tensors(artifact)[f"{EXPERT}.weight_scale"]
    scale[2, 1] = 0xFF
    edit(artifact, {f"{EXPERT}.weight_scale": scale})
    (difference,) = verify(artifact, source=None, deep=True, progress=None).differences
    assert (difference.check, difference.tensor) == ("scales", f"{EXPERT}.weight_scale")
    assert "1 of" in difference.found and "NaN, the first at [2, 1]" in difference.found


def test_an_expert_without_tokens_and_without_fallback_is_an_error(base: Path, tmp_path: Path) -> None:
    """`Config` refuses this, so it takes a config made by hand; no artifact may come of it even so."""
    job = with_activations(base, tmp_path / "out", samples=1, length=8, experts="routed", fallback="layer_max")
    unsafe = job.config.activations.model_copy(update={"fallback": None})
    with pytest.raises(CalibrationError, match="input_global_scale"):
        run(replace(job, config=job.config.model_copy(update={"activations": unsafe})))
    assert not (job.out / "model.safetensors.index.json").exists()


# ------------------------------------------------------------------------------------------------ memory

WIDE = ToyConfig(
    hidden_size=512, moe_intermediate_size=384, n_routed_experts=16, compress_ratios=(0,) * 4, num_hash_layers=1
)

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""Makes glibc return what is freed. It keeps pieces of it otherwise, here as much as several of these small blocks,
by the chance of which thread freed what when; what is measured is what the run holds on to."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, int]]:
    """Layers -> bytes of the source's largest block, peak bytes of a fresh process that quantized it."""
    folder = tmp_path_factory.mktemp("memory")
    config = yaml.safe_load((CONFIGS / "nvfp4-fp8-mtp-minmax.yaml").read_text())
    config |= {"output": {"shards": 4}, **FEW}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sources = {layers: folder / f"source{layers}" for layers in (4, 12)}
    for layers, source in sources.items():
        write_toy(source, replace(WIDE, compress_ratios=(0,) * layers))

    def peak(source: Path) -> int:
        out = folder / f"{source.name}.out"
        line = ("quantize", str(source), str(out), "-c", str(folder / "config.yaml"), "--device", "cpu", "-q")
        command(*line, **GIVE_BACK)
        return json.loads((out / "report.json").read_text())["peak_memory"]["host"]

    with ThreadPoolExecutor() as pool:
        found = dict(zip(sources, pool.map(peak, sources.values()), strict=True))
    block = sum(t.nbytes for name, t in tensors(sources[4]).items() if name.startswith("layers.3."))
    return {layers: (block, bytes_) for layers, bytes_ in found.items()}


def test_peak_memory_does_not_grow_with_the_number_of_layers(peaks: dict[int, tuple[int, int]]) -> None:
    (block, small), (_, large) = peaks[4], peaks[12]
    assert block > 15e6
    assert large - small < 1.5 * block, f"{large - small:,} more for 8 blocks of {block:,}"


def test_reported_peak_is_this_process_and_not_its_parent(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; held = bytearray(900_000_000);"
        "child = 'from dsv4q.report.build import peak_memory; print(peak_memory()[\"host\"])';"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert 5e6 < int(shown.stdout) < 500e6
