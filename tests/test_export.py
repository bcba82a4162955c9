"""`dsv4q export`: an artifact in ModelOpt's layout and back, the same bytes whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifact_maker import edit
from dsv4q.__main__ import main
from dsv4q.checkpoint.files import INDEX
from dsv4q.checkpoint.native import scan_source
from dsv4q.config import load_config
from dsv4q.console import Console, Mode
from dsv4q.dequantize import Dequantization, dequantize
from dsv4q.diff import DiffRequest, diff
from dsv4q.errors import ConfigError, Dsv4qError, OutputError, ResumeError, SourceError, UsageError, VerificationFailed
from dsv4q.export import links
from dsv4q.export.job import Export
from dsv4q.export.plan import plan_export
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT, modelopt_tensors
from dsv4q.made_up.native import grid_form, native_form
from dsv4q.made_up.toy import with_draft, write_toy
from dsv4q.plan.plan import make_plan
from dsv4q.report.page.write import PageRequest, write_report
from dsv4q.verify.judge import verify, verify_headers
from export_toys import (
    EXPERT,
    TINY,
    digests,
    native_toy,
    one_file_a_block,
    quantized,
    raw,
    run,
    tensors,
    to_compressed,
    to_modelopt,
)
from killing import changes_of, killed
from runs import CONFIGS, FLASH, at_toy_size


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_toy(tmp_path_factory.mktemp("source") / "native")


@pytest.fixture(scope="module")
def artifact(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(native, tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture(scope="module")
def modelopt(native: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_modelopt(artifact, native, tmp_path_factory.mktemp("modelopt") / "out")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def refusal(job: Export) -> Dsv4qError:
    with pytest.raises(Dsv4qError) as caught:
        run(job)
    return caught.value


# ------------------------------------------------------------------------------------------------ what comes out


def test_experts_have_the_bytes_of_the_artifact_and_scalars_their_reciprocals(artifact: Path, modelopt: Path) -> None:
    ours, theirs = tensors(artifact), tensors(modelopt)
    for stored in (tensor for tensor in modelopt_tensors(TINY.dims) if tensor.twin):
        made, twin = theirs[stored.name], ours[stored.twin]
        if stored.inverse:
            assert made.dtype == torch.float32 and made.shape == ()
            assert raw(made) == raw(1 / twin)
        else:
            assert made.shape == twin.shape and raw(made) == raw(twin), stored.name


def test_every_other_tensor_has_the_bytes_of_the_release(native: Path, modelopt: Path) -> None:
    source, made = tensors(native), tensors(modelopt)
    experts = {t.name for t in modelopt_tensors(TINY.dims) if t.twin}
    assert made.keys() == {t.name for t in modelopt_tensors(TINY.dims)}
    for name in made.keys() - experts:
        assert made[name].dtype == source[name].dtype and raw(made[name]) == raw(source[name]), name
    assert not any(name.endswith(".scale") and ".experts." in name and name.startswith("layers.") for name in made)


def test_config_json_is_the_source_s_with_what_the_engines_read(native: Path, modelopt: Path) -> None:
    source, made = (json.loads((folder / "config.json").read_text()) for folder in (native, modelopt))
    quantization, stated = made.pop("quantization_config"), source.pop("quantization_config")
    assert made == source and made["expert_dtype"] == "fp4"
    assert {key: quantization[key] for key in stated} == stated
    assert {k: quantization[k] for k in ("quant_algo", "moe_quant_algo", "group_size", "kv_cache_quant_algo")} == {
        "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None,
    }  # fmt: skip
    assert quantization["ignore"] == ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    layers = {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in range(TINY.dims.layers)}
    assert quantization["quantized_layers"] == layers
    beside = json.loads((modelopt / "hf_quant_config.json").read_text())
    assert beside["producer"] == quantization["producer"]
    assert beside["quantization"]["exclude_modules"] == quantization["ignore"]
    assert beside["quantization"]["quantized_layers"] == layers


def test_small_files_are_those_of_the_release_and_nothing_is_left_over(native: Path, modelopt: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "encoding/README.md", "LICENSE"):
        assert (modelopt / name).read_bytes() == (native / name).read_bytes()
    assert not (modelopt / ".dsv4q").exists()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in modelopt.rglob("*") if path.is_file())


def test_the_report_has_what_was_made_and_the_report_of_the_artifact(artifact: Path, modelopt: Path) -> None:
    report = json.loads((modelopt / "report.json").read_text())
    assert report["artifact"]["tensors"] == len(tensors(modelopt))
    assert report["artifact"]["mtp_tensors"] == sum(name.startswith("mtp.") for name in tensors(modelopt))
    assert [s["bytes"] for s in report["artifact"]["shards"]] == [
        (modelopt / s["file"]).stat().st_size for s in report["artifact"]["shards"]
    ]
    assert report["is_pinned"] and report["origin"] == json.loads((artifact / "report.json").read_text())


# ------------------------------------------------------------------------------------------------ and back


@pytest.mark.parametrize("config", ["toy", "nvfp4-fp8"])
@pytest.mark.parametrize("mtp_layers", [0, 1, 2])
def test_the_way_back_gives_every_file_that_quantize_wrote(tmp_path: Path, config: str, mtp_layers: int) -> None:
    if mtp_layers == 0 and config == "toy":
        pytest.skip("the config keeps a draft that is not there")
    toy = replace(TINY, num_nextn_predict_layers=mtp_layers)
    source = native_toy(tmp_path / "native", toy)
    first = quantized(source, tmp_path / "first", config)
    back = to_compressed(to_modelopt(first, source, tmp_path / "modelopt"), source, tmp_path / "back")
    assert digests(back) == digests(first)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("mtp", {"experts": "nvfp4"}),
        ("mtp", {"shared_head_copies": False}),
        ("dspark", {}),
        ("dspark", {"linears": "fp8"}),
        ("dspark", {"experts": "bf16"}),
        ("dspark", {"keep": False}),
    ],
)
def test_the_way_back_knows_every_form_of_the_draft(tmp_path: Path, kind: str, form: dict[str, Any]) -> None:
    source = native_toy(tmp_path / "native", with_draft(replace(TINY, compress_ratios=(0, 4, 128)), kind))
    first = quantized(source, tmp_path / "first", **form)
    made = to_modelopt(first, source, tmp_path / "modelopt")
    assert verify(made, source=source, deep=True, progress=None).ok
    drafted = {name: tensor for name, tensor in tensors(source).items() if name.startswith("mtp.")}
    assert {n: raw(t) for n, t in tensors(made).items() if n.startswith("mtp.")} == {
        n: raw(t) for n, t in drafted.items()
    }
    assert digests(to_compressed(made, source, tmp_path / "back")) == digests(first)


def test_the_way_back_needs_no_powers_of_two_among_the_input_scales(artifact: Path, modelopt: Path) -> None:
    divisors = [t.item() for name, t in tensors(artifact).items() if name.endswith("input_global_scale")]
    lost = [d for d in divisors if (1 / (1 / torch.tensor(d))).item() != d]
    noted = json.loads((modelopt / "report.json").read_text())["blocks"]
    assert len(lost) == sum(len(block.get("divisors", {})) for block in noted) > 0


def test_an_artifact_of_a_bf16_dequantization_comes_and_goes_too(native: Path, artifact: Path, tmp_path: Path) -> None:
    dequantize(Dequantization(native, tmp_path / "bf16"), Console(Mode.QUIET))
    first = quantized(tmp_path / "bf16", tmp_path / "first")
    made = to_modelopt(first, native, tmp_path / "modelopt")
    assert not json.loads((made / "report.json").read_text())["is_pinned"]
    back = to_compressed(made, native, tmp_path / "back")
    shards = [name for name in digests(first) if name.startswith("model")]
    assert {n: digests(back)[n] for n in shards} == {n: digests(first)[n] for n in shards}


def test_an_artifact_without_our_report_goes_back_with_a_config(native: Path, artifact: Path, tmp_path: Path) -> None:
    first = copy(artifact, tmp_path / "first")
    (first / "report.json").unlink()
    made = to_modelopt(first, native, tmp_path / "modelopt")
    job = Export(made, tmp_path / "back", native, COMPRESSED)
    error = refusal(job)
    assert isinstance(error, ConfigError) and "--config" in str(error)
    assert not job.out.exists()
    run(replace(job, config=at_toy_size(load_config(CONFIGS / "toy.yaml"))))
    exact = {n: t for n, t in tensors(artifact).items() if not n.endswith("input_global_scale")}
    back = tensors(job.out)
    assert back.keys() == tensors(artifact).keys()
    assert all(raw(back[name]) == raw(tensor) for name, tensor in exact.items())


# ------------------------------------------------------------------------------------------------ whole files


def test_files_of_the_release_without_a_main_expert_are_the_same_files(native: Path, tmp_path: Path) -> None:
    source = one_file_a_block(native, tmp_path / "native")
    made = to_modelopt(quantized(source, tmp_path / "first"), source, tmp_path / "out")
    shared = json.loads((made / "report.json").read_text())["artifact"]["files_of_the_source"]
    assert sorted(shared.values()) == [f"model-0000{n}-of-00005.safetensors" for n in (1, 4, 5)]  # embed, head, mtp.0
    for ours, theirs in shared.items():
        assert (made / ours).read_bytes() == (source / theirs).read_bytes()
        assert (made / ours).stat().st_nlink == 2 or (made / ours).stat().st_ino != (source / theirs).stat().st_ino


@pytest.mark.parametrize("why", ["no links", "not for everybody"])
def test_where_a_file_cannot_be_linked_it_is_copied(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(95, "Operation not supported")

    source = one_file_a_block(native, tmp_path / "native")
    first = quantized(source, tmp_path / "first")
    if why == "no links":
        monkeypatch.setattr(links.os, "link", refuse)
    else:
        for file in source.glob("*.safetensors"):
            file.chmod(0o600)
    made = to_modelopt(first, source, tmp_path / "out")
    for file in made.glob("*.safetensors"):
        assert file.stat().st_nlink == 1 and file.stat().st_mode & 0o777 == 0o644


def test_nothing_that_a_run_does_changes_the_release(native: Path, tmp_path: Path) -> None:
    source = one_file_a_block(native, tmp_path / "native")
    first = quantized(source, tmp_path / "first")
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in source.rglob("*") if path.is_file()}
    job = Export(first, tmp_path / "out", source, MODELOPT)
    count = changes_of(lambda: run(replace(job, out=tmp_path / "count")))
    killed(lambda: run(job), count // 2)
    run(replace(job, resume=False))
    assert {path: (path.read_bytes(), path.stat().st_mode) for path in source.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def taking_over(native: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, int]:
    """A finished export of a release with a file for each block, and how often it changed the disk."""
    root = tmp_path_factory.mktemp("taking_over")
    source = one_file_a_block(native, root / "native")
    made = Export(quantized(source, root / "first"), root / "out", source, MODELOPT)
    return made, changes_of(lambda: run(made))


@pytest.mark.parametrize("part", [0.1, 0.25, 0.4, 0.6, 0.75, 0.9])
def test_a_killed_run_that_takes_files_over_is_finished_by_the_same_command(
    taking_over: tuple[Export, int], tmp_path: Path, part: float
) -> None:
    whole, changes = taking_over
    job = replace(whole, out=tmp_path / "out")
    assert killed(lambda: run(job), int(part * changes))
    run(job)
    assert digests(job.out) == digests(whole.out)


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "mtp.0.attn.wq_a.weight"])
def test_a_tensor_of_a_file_taken_over_that_is_not_the_artifact_s_is_found(
    native: Path, tmp_path: Path, name: str
) -> None:
    source = one_file_a_block(native, tmp_path / "native")
    first = quantized(source, tmp_path / "first")
    (first / "report.json").unlink()
    tensor = tensors(source)[name]
    tensor.view(torch.uint8)[3, 5] ^= 1
    edit(source, {name: tensor})
    error = refusal(Export(first, tmp_path / "out", source, MODELOPT))
    assert isinstance(error, SourceError) and "do not belong together" in error.what and name in str(error)
    assert not (tmp_path / "out" / INDEX).exists()


def test_shards_are_balanced(native: Path, artifact: Path, modelopt: Path) -> None:
    shared = json.loads((modelopt / "report.json").read_text())["artifact"]["files_of_the_source"]
    sizes = [path.stat().st_size for path in modelopt.glob("*.safetensors") if path.name not in shared]
    assert max(sizes) < 1.25 * min(sizes)


# ------------------------------------------------------------------------------------------------ the other commands


def test_diff_finds_the_same_values_in_both_layouts(artifact: Path, modelopt: Path) -> None:
    found = diff(DiffRequest(artifact, modelopt), Console(Mode.QUIET))
    assert {pair["verdict"] for pair in found["tensors"]} == {"equal_values"}
    assert found["only_b"] == [] and all(name.startswith("mtp.0.") for name in found["only_a"])  # the head's copies


def test_two_artifacts_with_other_divisors_are_not_equal_by_their_reciprocals(artifact: Path, tmp_path: Path) -> None:
    other, name = copy(artifact, tmp_path / "other"), f"{EXPERT}.input_global_scale"
    divisors = torch.linspace(1.5, 2, 100)
    following = divisors.nextafter(torch.tensor(2.0))
    at = int((1 / divisors == 1 / following).nonzero()[0])
    edit(other, {name: divisors[at : at + 1].clone()})
    edit(copy(other, tmp_path / "next"), {name: following[at : at + 1].clone()})
    (pair,) = diff(DiffRequest(other, tmp_path / "next"), Console(Mode.QUIET))["tensors"]
    assert pair["verdict"] == "different"


def test_the_plan_says_what_an_export_will_write(native: Path, artifact: Path, modelopt: Path) -> None:
    with scan_source(native) as source:
        planned = plan_export(source, make_plan(source, at_toy_size(load_config(CONFIGS / "toy.yaml")))).as_dict()
    made = json.loads((modelopt / "report.json").read_text())["artifact"]
    assert {key: made[key] for key in planned} == planned


@pytest.mark.parametrize(
    ("release", "count", "size"),
    [
        ("deepseek-v4-flash", 135_235, 168_266_793_544),
        ("deepseek-v4-flash-0731", 138_365, 175_535_844_088),
        ("deepseek-v4-pro-0813", 290_326, 941_084_273_896),
    ],
)
def test_a_skeleton_of_full_size_is_as_it_must_be(tmp_path: Path, release: str, count: int, size: int) -> None:
    config = FLASH.parent.parent / release / "config.json"
    arguments = ["--config", "nvfp4-fp8-mtp", "--layout", "modelopt", "--skeleton", str(tmp_path / "out"), "--quiet"]
    with pytest.raises(SystemExit) as done:
        main(["plan", str(config), *arguments])
    assert not done.value.code
    result = verify_headers(tmp_path / "out")
    assert result.ok and (result.tensors, result.bytes) == (count, size)


@pytest.mark.parametrize(("form", "config", "told"), [("bf16", "toy", "BF16"), ("native", "w4a16-fp8-mtp", "NVFP4")])
def test_the_plan_says_why_there_can_be_no_export(tmp_path: Path, form: str, config: str, told: str) -> None:
    root = write_toy(tmp_path / "source", TINY, form=grid_form() if form == "bf16" else native_form()).out
    with scan_source(root) as source, pytest.raises(Dsv4qError, match=told):
        plan_export(source, make_plan(source, at_toy_size(load_config(CONFIGS / f"{config}.yaml"))))


def test_the_page_of_an_export_shows_what_the_run_found(modelopt: Path, tmp_path: Path) -> None:
    made = write_report(PageRequest(modelopt, tmp_path / "page.html", deep=True), lambda *_: None)
    assert not made.gaps and made.checked is not None and not made.checked.differences
    page = (tmp_path / "page.html").read_text()
    assert "to modelopt&#39;s layout" in page or "to modelopt's layout" in page


# ------------------------------------------------------------------------------------------------ kills and resumes


@pytest.fixture(scope="module", params=[MODELOPT, COMPRESSED])
def job(request: pytest.FixtureRequest, native: Path, artifact: Path, modelopt: Path, tmp_path_factory: Any) -> Export:
    """Either direction, finished once."""
    of = artifact if request.param == MODELOPT else modelopt
    made = Export(of, tmp_path_factory.mktemp("whole") / "out", native, request.param)
    run(made)
    return made


@pytest.fixture(scope="module")
def changes(job: Export, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run changes the disk."""
    out = tmp_path_factory.mktemp("count") / "out"
    return changes_of(lambda: run(replace(job, out=out)))


@pytest.mark.parametrize("part", [0, 0.02, 0.06, 0.12, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9])
def test_a_run_killed_after_this_part_of_its_writes_is_finished_by_the_same_command(
    job: Export, changes: int, tmp_path: Path, part: float
) -> None:
    again = replace(job, out=tmp_path / "out")
    assert killed(lambda: run(again), int(part * changes))
    run(again)
    assert digests(again.out) == digests(job.out)


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5, 7, 9, 13, 20, 30])
def test_a_run_killed_this_few_writes_before_its_end_is_finished_by_the_same_command(
    job: Export, changes: int, tmp_path: Path, left: int
) -> None:
    again = replace(job, out=tmp_path / "out")
    assert killed(lambda: run(again), changes - left)
    run(again)
    assert digests(again.out) == digests(job.out)


def test_a_run_killed_again_and_again_gets_there_with_the_same_bytes(job: Export, changes: int, tmp_path: Path) -> None:
    again, kills = replace(job, out=tmp_path / "out"), 0
    # The largest block is nearly half of what is written, and one that is not finished is begun anew.
    while killed(lambda: run(again), changes * 3 // 5):
        kills += 1
    assert kills >= 1
    assert digests(again.out) == digests(job.out)


def begun(job: Export, changes: int, out: Path) -> Export:
    """A run that was killed when some blocks were done."""
    again = replace(job, out=out)
    assert killed(lambda: run(again), changes * 3 // 4)
    return again


def test_no_resume_starts_over_and_gives_the_same_bytes(job: Export, changes: int, tmp_path: Path) -> None:
    again = begun(job, changes, tmp_path / "out")
    run(replace(again, resume=False))
    assert digests(again.out) == digests(job.out)


def test_resume_with_another_artifact_is_refused(job: Export, changes: int, native: Path, tmp_path: Path) -> None:
    again = begun(job, changes, tmp_path / "out")
    other = copy(job.artifact, tmp_path / "other")
    tensor = tensors(other)["embed.weight"].clone()
    edit(other, {"embed.weight": tensor})  # the same tensors in other files
    error = refusal(replace(again, artifact=other))
    assert isinstance(error, ResumeError) and "input" in error.what


def test_a_shard_that_was_changed_meanwhile_is_named(job: Export, changes: int, tmp_path: Path) -> None:
    again = begun(job, changes, tmp_path / "out")
    shard = next(path for path in again.out.glob("model-*") if path.stat().st_nlink == 1)
    shard.write_bytes(shard.read_bytes()[:-1])
    error = refusal(again)
    assert isinstance(error, OutputError) and shard.name.removesuffix(".partial") in str(error)


def test_a_finished_export_is_left_as_it_is_by_the_same_command(job: Export) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in job.out.rglob("*")}
    assert run(job) == json.loads((job.out / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in job.out.rglob("*")} == stamps


def test_a_finished_export_is_not_overwritten(job: Export, artifact: Path, modelopt: Path) -> None:
    other = {MODELOPT: (modelopt, COMPRESSED), COMPRESSED: (artifact, MODELOPT)}[job.layout]
    error = refusal(replace(job, artifact=other[0], layout=other[1]))
    assert isinstance(error, OutputError) and "finished artifact of another" in error.what


# ------------------------------------------------------------------------------------------------ refusals


def test_a_bf16_source_is_refused_with_the_reason(artifact: Path, tmp_path: Path) -> None:
    source = write_toy(tmp_path / "bf16", TINY, form=grid_form()).out
    error = refusal(Export(artifact, tmp_path / "out", source, MODELOPT))
    assert isinstance(error, SourceError) and "BF16" in error.what and "official release" in str(error)
    assert not (tmp_path / "out").exists()


def test_a_release_with_fp8_experts_is_refused(artifact: Path, tmp_path: Path) -> None:
    source = write_toy(tmp_path / "base", TINY, form=native_form("fp8")).out
    error = refusal(Export(artifact, tmp_path / "out", source, MODELOPT))
    assert isinstance(error, SourceError) and ".scale" in str(error) and "F8_E8M0" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["a work folder", "no index"])
def test_an_unfinished_artifact_is_refused(native: Path, artifact: Path, tmp_path: Path, how: str) -> None:
    unfinished = copy(artifact, tmp_path / "artifact")
    if how == "no index":
        (unfinished / INDEX).unlink()
    else:
        (unfinished / ".dsv4q").mkdir()
    error = refusal(Export(unfinished, tmp_path / "out", native, MODELOPT))
    assert isinstance(error, OutputError) and "not finished" in error.what
    assert not (tmp_path / "out").exists()


def test_another_source_is_found_by_the_pin_before_a_byte_is_written(job: Export, tmp_path: Path) -> None:
    error = refusal(replace(job, out=tmp_path / "out", source=native_toy(tmp_path / "native", seed=1)))
    assert isinstance(error, SourceError) and "do not belong together" in error.what and "identity.source" in str(error)
    assert not (tmp_path / "out").exists()


def without_report(job: Export, tmp_path: Path) -> Export:
    """The same artifact with nothing that says what it was made from."""
    artifact = copy(job.artifact, tmp_path / "artifact")
    (artifact / "report.json").unlink()
    config = at_toy_size(load_config(CONFIGS / "toy.yaml")) if job.layout == COMPRESSED else None
    return replace(job, artifact=artifact, out=tmp_path / "out", config=config)


def test_without_a_pin_another_source_is_found_by_its_bytes_before_one_is_written(job: Export, tmp_path: Path) -> None:
    source = native_toy(tmp_path / "native", seed=1)
    error = refusal(replace(without_report(job, tmp_path), source=source))
    assert isinstance(error, SourceError) and "do not belong together" in error.what and "norm" in str(error)
    assert not (tmp_path / "out").exists()


def test_without_a_pin_other_experts_are_found_before_a_byte_is_written(job: Export, tmp_path: Path) -> None:
    source = copy(job.source, tmp_path / "native")
    other = tensors(native_toy(tmp_path / "seed", seed=1))
    edit(source, {name: tensor for name, tensor in other.items() if ".experts." in name})
    error = refusal(replace(without_report(job, tmp_path), source=source))
    assert isinstance(error, SourceError) and "do not belong together" in error.what and "experts" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["embed.weight", "layers.1.ffn.shared_experts.w1.weight", "head.weight"])
def test_a_tensor_that_is_not_the_source_s_is_found_while_it_is_written(job: Export, tmp_path: Path, name: str) -> None:
    source = copy(job.source, tmp_path / "native")
    tensor = tensors(source)[name]
    tensor.view(torch.uint8)[3, 5] ^= 1
    edit(source, {name: tensor})
    error = refusal(replace(without_report(job, tmp_path), source=source))
    assert isinstance(error, SourceError) and "do not belong together" in error.what and name in str(error)
    assert not (tmp_path / "out" / INDEX).exists()


def test_another_model_is_refused_by_its_dimensions(job: Export, tmp_path: Path) -> None:
    source = native_toy(tmp_path / "native", replace(TINY, n_routed_experts=4))
    error = refusal(replace(job, out=tmp_path / "out", source=source))
    assert isinstance(error, SourceError) and "experts" in str(error.where)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["w4a16-fp8-mtp"])
def test_an_artifact_without_nvfp4_experts_is_refused(native: Path, tmp_path: Path, config: str) -> None:
    first = quantized(native, tmp_path / "first", config)
    error = refusal(Export(first, tmp_path / "out", native, MODELOPT))
    assert isinstance(error, SourceError) and "not NVFP4" in error.what
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_minimum_and_maximum_goes_there_and_is_refused_on_the_way_back(
    native: Path, tmp_path: Path
) -> None:
    first = quantized(native, tmp_path / "first", "nvfp4-fp8-mtp-minmax")
    made = to_modelopt(first, native, tmp_path / "modelopt")
    error = refusal(Export(made, tmp_path / "out", native, COMPRESSED))
    assert isinstance(error, SourceError) and "exact" in error.what and "memoryless_minmax" in str(error)
    assert not (tmp_path / "out").exists()


def test_a_multiplier_without_an_exact_divisor_is_refused_where_no_report_has_it(
    native: Path, modelopt: Path, tmp_path: Path
) -> None:
    made = copy(modelopt, tmp_path / "artifact")
    (made / "report.json").unlink()
    edit(made, {f"{EXPERT}.weight_scale_2": torch.tensor(0.3) / 300})
    config = at_toy_size(load_config(CONFIGS / "toy.yaml"))
    error = refusal(Export(made, tmp_path / "out", native, COMPRESSED, config))
    assert isinstance(error, SourceError) and f"{EXPERT}.weight_scale_2" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "input_scale"])
def test_an_expert_that_was_changed_is_found_on_the_way_back(
    native: Path, modelopt: Path, tmp_path: Path, suffix: str
) -> None:
    made = copy(modelopt, tmp_path / "artifact")
    tensor = tensors(made)[f"{EXPERT}.{suffix}"]
    tensor.reshape(-1).view(torch.uint8)[0] ^= 1
    edit(made, {f"{EXPERT}.{suffix}": tensor})
    error = refusal(Export(made, tmp_path / "out", native, COMPRESSED))
    assert isinstance(error, VerificationFailed) and "layers.0" in str(error.where)
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_without_a_reciprocal_is_named(native: Path, artifact: Path, tmp_path: Path, bad: float) -> None:
    broken = copy(artifact, tmp_path / "artifact")
    edit(broken, {f"{EXPERT}.input_global_scale": torch.tensor([bad])})
    error = refusal(Export(broken, tmp_path / "out", native, MODELOPT))
    assert f"{EXPERT}.input_global_scale" in str(error) and not (tmp_path / "out" / INDEX).exists()


def test_copies_of_the_shared_head_in_the_release_are_refused(artifact: Path, native: Path, tmp_path: Path) -> None:
    source = copy(native, tmp_path / "native")
    edit(source, {"mtp.0.head.weight": tensors(native)["head.weight"]})
    error = refusal(Export(artifact, tmp_path / "out", source, MODELOPT))
    assert isinstance(error, SourceError) and "mtp.0.head.weight" in str(error)
    assert not (tmp_path / "out").exists()


def test_a_draft_that_is_not_as_in_the_release_is_refused(artifact: Path, native: Path, tmp_path: Path) -> None:
    source = copy(native, tmp_path / "native")
    plain = tensors(write_toy(tmp_path / "grid", TINY, form=grid_form()).out)
    gone = {name: None for name in tensors(native) if name.startswith("mtp.") and name.endswith(".scale")}
    edit(source, {**gone, **{name: t for name, t in plain.items() if name.startswith("mtp.")}})
    error = refusal(Export(artifact, tmp_path / "out", source, MODELOPT))
    assert isinstance(error, SourceError) and "mtp.0" in str(error) and "otherwise" in error.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["artifact", "source"])
def test_an_output_inside_what_is_read_is_refused(job: Export, inside: str) -> None:
    out = getattr(job, inside) / "out"
    assert isinstance(refusal(replace(job, out=out)), OutputError)
    assert not out.exists()


def test_a_folder_with_other_files_is_refused(job: Export, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    error = refusal(replace(job, out=tmp_path))
    assert isinstance(error, OutputError) and os.listdir(tmp_path) == ["notes.txt"]


def test_the_layout_that_the_artifact_has_already_is_refused(job: Export, tmp_path: Path) -> None:
    there = COMPRESSED if job.layout == MODELOPT else MODELOPT
    error = refusal(replace(job, out=tmp_path / "out", layout=there))
    assert isinstance(error, SourceError) and "already" in error.what


@pytest.mark.parametrize("layout", ["gguf", "ModelOpt", ""])
def test_a_layout_that_nobody_knows_is_a_usage_error(job: Export, tmp_path: Path, layout: str) -> None:
    error = refusal(replace(job, out=tmp_path / "out", layout=layout))
    assert isinstance(error, UsageError) and MODELOPT in str(error.expected)


def test_a_source_in_place_of_the_artifact_is_refused(native: Path, tmp_path: Path) -> None:
    other = copy(native, tmp_path / "other")
    error = refusal(Export(other, tmp_path / "out", native, MODELOPT))
    assert isinstance(error, SourceError) and "neither layout" in str(error)


def test_too_little_disk_is_refused(job: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4q.export.story.free_bytes", lambda path: 1000)
    assert "too little free disk" in refusal(replace(job, out=tmp_path / "out")).what
