"""Drafts of every kind and form through the whole job: bytes, exactness, the judge, deaths, ranks, dequantization."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from dsv4q.config import Activations, Config, DraftChoice, load_config
from dsv4q.console import Console, Mode
from dsv4q.dequantize import Dequantization, dequantize
from dsv4q.diff import DiffRequest, diff
from dsv4q.formats.encode import nvfp4_decode
from dsv4q.made_up.native import grid_form, native_form
from dsv4q.made_up.toy import RANDOM, ToyConfig, with_draft, write_toy
from dsv4q.quantize import Job
from dsv4q.rehearse import Rehearsal, rehearse
from dsv4q.verify.judge import verify
from eval_toys import run_eval
from killing import changes_of, killed
from runs import CONFIGS, finished_files, run

pytestmark = pytest.mark.usefixtures("saved_after_every_block")

SOURCES = {"random": RANDOM, "grid": grid_form(), "native": native_form(), "base": native_form("fp8")}
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dspark": ("dspark", "native", {}),
    "dspark of BF16 off the grid": ("dspark", "random", {}),
    "dspark of FP8 experts": ("dspark", "base", {}),
    "dspark with FP8 linears": ("dspark", "native", {"linears": "fp8"}),
    "dspark with FP8 linears, off the grid": ("dspark", "random", {"linears": "fp8"}),
    "dspark in BF16": ("dspark", "native", {"experts": "bf16"}),
    "dspark left out": ("dspark", "native", {"keep": False}),
    "mtp with NVFP4 experts": ("mtp", "native", {"experts": "nvfp4", "shared_head_copies": False}),
    "mtp with NVFP4 experts and head copies": ("mtp", "random", {"experts": "nvfp4"}),
}
EXACT = [name for name, (_, source, _) in FORMS.items() if source == "native"]


@dataclass(frozen=True)
class Made:
    """A finished artifact."""

    job: Job
    report: dict[str, Any]
    kind: str


def config_of(draft: dict[str, Any]) -> Config:
    return load_config(CONFIGS / "toy.yaml").model_copy(update={"draft": DraftChoice(**draft)})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy of each kind of draft and form of source: `dspark-native`, …."""
    folder = tmp_path_factory.mktemp("drafts")
    for kind in ("dspark", "mtp"):
        for name, form in SOURCES.items():
            write_toy(folder / f"{kind}-{name}", with_draft(ToyConfig(), kind), form=form)
    return folder


@pytest.fixture(scope="module")
def finished(base: Path) -> dict[str, Made]:
    found = {}
    for number, (name, (kind, source, draft)) in enumerate(FORMS.items()):
        job = Job(base / f"{kind}-{source}", base / f"out-{number}", config_of(draft), device="cpu")
        found[name] = Made(job, run(job), kind)
    return found


@pytest.fixture(params=FORMS)
def made(request: pytest.FixtureRequest, finished: dict[str, Made]) -> Made:
    return finished[request.param]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def modules(names: Any, end: str) -> list[str]:
    return [name.removesuffix(end) for name in names if name.startswith("mtp.") and name.endswith(end)]


# ------------------------------------------------------------------------------------------------ every form


def test_the_judge_passes_it_deep_and_against_the_source(made: Made) -> None:
    result = verify(made.job.out, source=made.job.source, deep=True, progress=None)
    assert [d.text() for d in result.differences] == []


def test_what_is_not_quantized_of_the_draft_has_the_bytes_of_the_source(made: Made, base: Path) -> None:
    # What a native source stands for is the toy on the grid.
    before = (
        tensors(base / made.job.source.name.replace("native", "grid")) if "base" not in made.job.source.name else {}
    )
    after = tensors(made.job.out)
    encoded = {f"{module}.weight" for module in (*modules(after, ".weight_packed"), *modules(after, ".weight_scale"))}
    kept = [name for name in before if name.startswith("mtp.") and name not in encoded]
    if made.job.config.draft.keep:
        assert all(raw(before[name]) == raw(after[name]) for name in kept)
    else:
        assert not [name for name in after if name.startswith("mtp.")]


def test_config_json_keeps_every_key_but_those_of_a_draft_that_is_left_out(made: Made) -> None:
    before, after = (json.loads((f / "config.json").read_text()) for f in (made.job.source, made.job.out))
    before.pop("quantization_config", None)
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    if not made.job.config.draft.keep:
        before = {k: v for k, v in before.items() if not k.startswith("dspark_")} | {"num_nextn_predict_layers": 0}
    assert after == before


def test_the_model_card_says_the_method_of_the_draft(made: Made) -> None:
    card = (made.job.out / "README.md").read_text()
    tokens = {"dspark": 5, "mtp": 2}[made.kind]
    option = f"""--speculative-config '{{"method":"{made.kind}","num_speculative_tokens":{tokens}}}'"""
    assert (option in card) == made.job.config.draft.keep
    assert card.count("speculative-config") == made.job.config.draft.keep


@pytest.mark.parametrize("name", EXACT)
def test_every_quantized_linear_of_a_native_source_is_exact_in_the_draft_too(
    name: str, finished: dict[str, Made]
) -> None:
    made = finished[name]
    for role, errors in made.report["errors"].items():
        assert (errors["exact"], errors["max_abs_error"]) == (errors["tensors"], 0), role
    drafted = {role: e["tensors"] for role, e in made.report["errors"].items() if role.startswith("mtp: ")}
    stages, draft = (3 if made.kind == "dspark" else 1), made.job.config.draft
    experts = {"mtp: routed expert": 24 * stages} if draft.keep and draft.experts != "bf16" else {}
    linears = {"mtp: attention projection": 15, "mtp: shared expert": 9, "mtp: draft input": 1}
    assert drafted == experts | (linears if draft.linears == "fp8" else {})


@pytest.mark.parametrize("name", ["dspark", "dspark with FP8 linears", "mtp with NVFP4 experts"])
def test_experts_of_the_draft_decode_to_the_bits_of_the_source(
    name: str, finished: dict[str, Made], base: Path
) -> None:
    made = finished[name]
    source, stored = tensors(base / f"{made.kind}-grid"), tensors(made.job.out)
    experts = modules(stored, ".weight_packed")
    assert experts
    for module in experts:
        packed, scale, whole = (
            stored[f"{module}.{s}"] for s in ("weight_packed", "weight_scale", "weight_global_scale")
        )
        assert raw(nvfp4_decode(packed, scale.float(), whole).to(torch.bfloat16)) == raw(source[f"{module}.weight"])


@pytest.mark.parametrize("name", ["dspark", "dspark of BF16 off the grid", "mtp with NVFP4 experts"])
def test_input_scales_of_the_draft_are_the_analytic_bounds(name: str, finished: dict[str, Made]) -> None:
    stored = tensors(finished[name].job.out)
    for module in modules(stored, ".weight_packed"):
        norm = stored[f"{module.partition('.ffn.')[0]}.ffn_norm.weight"].float()
        bound = 100.0 if module.endswith("w2") else math.sqrt(norm.numel()) * float(norm.abs().max())
        assert float(stored[f"{module}.input_global_scale"]) == pytest.approx(448 * 6 / bound, rel=1e-6)


def test_input_scales_that_are_bounds_everywhere_leave_the_draft_as_it_is(
    finished: dict[str, Made], tmp_path: Path
) -> None:
    observed = finished["dspark with FP8 linears"].job
    config = observed.config.model_copy(update={"activations": Activations(scales="bound"), "calibration": None})
    run(replace(observed, config=config, out=tmp_path / "out"))
    ours, theirs = tensors(tmp_path / "out"), tensors(observed.out)
    differing = {name for name, tensor in ours.items() if raw(tensor) != raw(theirs[name])}
    assert ours.keys() == theirs.keys() and differing
    assert {name.rpartition(".")[2] for name in differing} == {"input_global_scale"}
    assert not [name for name in differing if name.startswith("mtp.")]
    assert verify(tmp_path / "out", source=observed.source, deep=True, progress=None).ok


@pytest.mark.parametrize("name", ["dspark of BF16 off the grid", "dspark with FP8 linears, off the grid"])
def test_a_draft_off_the_grid_is_rounded_as_the_main_layers_are(name: str, finished: dict[str, Made]) -> None:
    errors = finished[name].report["errors"]
    drafted = {role.removeprefix("mtp: "): one for role, one in errors.items() if role.startswith("mtp: ")}
    assert drafted.keys() >= {"routed expert"}
    for role, one in drafted.items():
        usual = errors["routed expert" if role == "routed expert" else "attention projection"]["relative_error"]
        assert one["exact"] == 0 and one["relative_error"] == pytest.approx(usual, rel=0.05), role


def test_scales_of_fp8_blocks_are_f32_with_a_draft_that_is_quantized_or_dspark(made: Made) -> None:
    stored = tensors(made.job.out)
    scales = {str(t.dtype) for n, t in stored.items() if n.endswith(".attn.wq_b.weight_scale")}
    assert scales == {"torch.float32" if made.job.config.draft.keep else "torch.bfloat16"}


def test_the_report_says_in_which_form_the_draft_is(made: Made) -> None:
    draft = made.report["artifact"]["draft"]
    assert draft["kind"] == (made.kind if made.job.config.draft.keep else "none")
    assert (draft["speculative_config"] or {}).get("method") == (made.kind if made.job.config.draft.keep else None)


# ------------------------------------------------------------------------------------------------ every way


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in finished_files(out)}


@pytest.mark.parametrize("name", EXACT)
def test_a_native_source_and_its_dequantization_give_the_same_artifact(
    name: str, finished: dict[str, Made], base: Path, tmp_path: Path
) -> None:
    native, kind = finished[name].job, finished[name].kind
    report = dequantize(Dequantization(native.source, tmp_path / "plain"), Console(Mode.QUIET))
    plain, grid = tensors(tmp_path / "plain"), tensors(base / f"{kind}-grid")
    assert report["tensors"] == len(plain) == {"dspark": 399, "mtp": 308}[kind]
    assert {name: raw(t) for name, t in plain.items()} == {name: raw(t) for name, t in grid.items()}
    assert verify(tmp_path / "plain", source=native.source, deep=True, progress=None).ok
    run(replace(native, source=tmp_path / "plain", out=tmp_path / "out"))
    ours, theirs = files(tmp_path / "out"), files(native.out)
    # The model card says from which files it was made.
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} == {"README.md"}


PARTS = (0.02, 0.3, 0.55, 0.62, 0.69, 0.76, 0.83, 0.88, 0.92, 0.95, 0.97, 0.98, 0.99)
"""Of the changes of the disk; the draft comes last."""
KILLED = {
    "dspark with FP8 linears": PARTS, "dspark": PARTS[5::3], "dspark in BF16": PARTS[5::3],
    "dspark of BF16 off the grid": PARTS[4::4], "mtp with NVFP4 experts": PARTS[5::3],
}  # fmt: skip


@pytest.fixture(scope="module")
def changes(finished: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often a run with each of these drafts changes the disk."""
    folder = tmp_path_factory.mktemp("counted")
    jobs = {name: replace(finished[name].job, out=folder / name) for name in KILLED}
    return {name: changes_of(lambda job=job: run(job)) for name, job in jobs.items()}  # type: ignore[misc]


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in KILLED.items() for part in parts])
def test_a_run_killed_after_this_part_of_its_writes_is_finished_by_the_same_command(
    name: str, part: float, finished: dict[str, Made], changes: dict[str, int], tmp_path: Path
) -> None:
    whole = finished[name].job
    job = replace(whole, out=tmp_path / "out")
    assert killed(lambda: run(job), int(part * changes[name]))
    run(job)
    assert files(job.out) == files(whole.out)


@pytest.mark.parametrize(
    "name",
    ["dspark", "dspark with FP8 linears", "mtp with NVFP4 experts", "dspark in BF16", "dspark of BF16 off the grid"],
)
def test_two_ranks_write_the_bytes_of_one(name: str, finished: dict[str, Made], tmp_path: Path) -> None:
    job = finished[name].job
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(job.config.model_dump(mode="json")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dsv4q"]
    command = ["quantize", job.source, tmp_path / "out", "-c", tmp_path / "config.yaml", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*start, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(job.out)


# ------------------------------------------------------------------------------------------------ the other commands


def test_diff_finds_no_value_of_a_native_source_changed(finished: dict[str, Made]) -> None:
    job = finished["dspark with FP8 linears"].job
    found = diff(DiffRequest(job.source, job.out, "cpu"), Console(Mode.QUIET))
    classes = {name: c for name, c in found["classes"].items() if name.startswith("mtp: ")}
    assert set(classes) >= {"mtp: routed expert", "mtp: draft input", "mtp: draft head", "mtp: shared expert"}
    assert {name for name, c in found["classes"].items() if c["different"] or c["only_a"]} == set()


def test_eval_says_that_acceptance_of_a_dspark_draft_is_not_computed_offline(finished: dict[str, Made]) -> None:
    job = finished["dspark"].job
    result = run_eval(job.out, job.source)
    reason = "the acceptance of a DSpark draft is not computed offline"
    assert result["acceptance"]["without_draft"] == {"reference": reason, "artifact": reason}
    assert result["perplexity"]["ratio"]["value"] > 0 and result["kl_divergence"]["value"] > 0
    assert result["emulated"] == {"float-quantized": 25, "nvfp4-pack-quantized": 120}


def test_eval_rounds_the_inputs_of_an_mtp_draft_with_nvfp4_experts(finished: dict[str, Made]) -> None:
    job = finished["mtp with NVFP4 experts"].job
    result = run_eval(job.out, job.source)
    assert result["acceptance"]["without_draft"] == {}
    assert result["emulated"] == {"float-quantized": 25, "nvfp4-pack-quantized": 144}


@pytest.mark.parametrize(
    ("layers", "native", "draft"),
    [(1, False, {"linears": "fp8"}), (2, True, {"linears": "fp8"}), (None, False, {"linears": "fp8"}),
     (None, True, {}), (1, True, {"experts": "bf16"})],
)  # fmt: skip
def test_a_rehearsal_of_a_dspark_release_is_judged_without_a_difference(
    tmp_path: Path, layers: int | None, native: bool, draft: dict[str, Any]
) -> None:
    file = tmp_path / "release" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(with_draft(ToyConfig(), "dspark").as_config_json()))
    wanted = Rehearsal(tmp_path / "out", config_of(draft), file, layers=layers, device="cpu", native=native)
    result = rehearse(wanted, Console(Mode.QUIET))
    expected = 144 if "experts" in draft else 385 if "linears" in draft else 360
    assert result["differences"] == [] and result["counts"]["mtp_tensors"] == expected
    assert result["counts"]["exact"].get("mtp: routed expert", 0) == (0 if "experts" in draft else 72)
