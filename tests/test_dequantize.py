"""`dsv4q dequantize`: the BF16 checkpoint that a native one stands for, exact, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifact_maker import edit
from dsv4q.checkpoint import values
from dsv4q.checkpoint.files import INDEX
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import open_source
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.console import Console, Mode
from dsv4q.dequantize import Dequantization, dequantize
from dsv4q.errors import ConfigError, DeviceError, Dsv4qError, OutputError, ResumeError, SourceError, WeightError
from dsv4q.layout import source_tensors
from dsv4q.made_up.native import grid_form, native_form, stored_specs
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.judge import VerifyResult, verify
from killing import changes_of, killed
from runs import finished_files

TINY = ToyConfig(
    hidden_size=128, n_routed_experts=2, compress_ratios=(4, 128), num_hash_layers=1, vocab_size=300, shards=3
)
EXPERT = "layers.0.ffn.experts.1.w2"


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The native toy, the toy on the grid, and what dequantize makes of the first."""
    root = tmp_path_factory.mktemp(request.param)
    native = write_toy(root / "native", TINY, form=native_form(request.param)).out
    grid = write_toy(root / "grid", TINY, form=grid_form(request.param)).out
    run(Dequantization(native, root / "out"))
    return native, grid, root / "out"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("source") / "native", TINY, form=native_form()).out


@pytest.fixture(scope="module")
def whole(native: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(Dequantization(native, out))
    return digests(out)


def run(job: Dequantization, device: str = "cpu") -> dict[str, Any]:
    return dequantize(replace(job, device=device), Console(Mode.QUIET))


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in finished_files(out)}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def judged(out: Path, source: Path) -> VerifyResult:
    return verify(out, source=source, deep=True, progress=None)


def refusal(job: Dequantization) -> Dsv4qError:
    with pytest.raises(Dsv4qError) as caught:
        run(job)
    return caught.value


# ------------------------------------------------------------------------------------------------ what comes out


def test_every_tensor_is_that_of_the_grid_toy_bit_for_bit(twins: tuple[Path, Path, Path]) -> None:
    made, grid = tensors(twins[2]), tensors(twins[1])
    assert made.keys() == grid.keys()
    for name, tensor in grid.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_every_other_file_is_that_of_the_grid_toy(twins: tuple[Path, Path, Path]) -> None:
    made, grid = ({n: d for n, d in digests(folder).items() if "model" not in n} for folder in (twins[2], twins[1]))
    assert made == grid
    assert {"config.json", "tokenizer.json", "encoding/README.md", "chat_samples.jsonl"} <= made.keys()


def test_every_tensor_stays_in_the_file_that_had_its_weight(twins: tuple[Path, Path, Path]) -> None:
    before, after = (json.loads((folder / INDEX).read_text())["weight_map"] for folder in (twins[0], twins[2]))
    assert after == {name: file for name, file in before.items() if not name.endswith(".scale")}
    assert len(after) == len(source_tensors(TINY.dims))


@pytest.mark.parametrize("source", [0, 1], ids=["native", "grid"])
def test_verify_accepts_it_against_either_twin(twins: tuple[Path, Path, Path], source: int) -> None:
    result = judged(twins[2], twins[source])
    assert result.ok, [difference.text() for difference in result.differences]
    assert result.kind == "plain"
    assert result.checks["bytes"] == result.checks["values"] == result.tensors == len(source_tensors(TINY.dims))


def test_files_may_be_read_by_everybody_and_nothing_is_left_over(twins: tuple[Path, Path, Path]) -> None:
    files = [path for path in twins[2].rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
    assert not (twins[2] / ".dsv4q").exists()


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_a_number_of_shards_can_be_asked_for(native: Path, tmp_path: Path, shards: int) -> None:
    report = run(Dequantization(native, tmp_path / "out", shards=shards))
    assert report["shards"] == [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    assert judged(tmp_path / "out", native).ok


def test_tensors_stored_alike_are_decoded_together_as_they_are_alone(
    native: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_source(native) as source:
        names = [spec.name for spec in source_tensors(TINY.dims) if spec.block == "layers.0"]
        together = values.batches(source, names, torch.device("cpu"))
        assert max(len(batch.names) for batch in together) > 1
    monkeypatch.setattr(values, "TOGETHER", {"cpu": 1})
    run(Dequantization(native, tmp_path / "out"))
    assert digests(tmp_path / "out") == whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_same_bytes(native: Path, whole: dict[str, str], tmp_path: Path) -> None:
    run(Dequantization(native, tmp_path / "out"), device="cuda")
    assert digests(tmp_path / "out") == whole


def split_off_scales(native: Path, to: Path) -> Path:
    """The same checkpoint with all scales in the second of three files."""
    shutil.copytree(native, to, ignore=shutil.ignore_patterns("model*"))
    every = tensors(native)
    files = {
        name: f"part-{2 if name.endswith('.scale') else 1 + 2 * (name > 'layers.1')}.safetensors" for name in every
    }
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in every.items() if files[name] == file}, to / file)
    (to / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return to


def test_a_file_of_scales_alone_is_left_out_and_the_series_stays_whole(native: Path, tmp_path: Path) -> None:
    report = run(Dequantization(split_off_scales(native, tmp_path / "native"), tmp_path / "out"))
    assert report["shards"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert judged(tmp_path / "out", native).ok


def test_the_report_counts_what_was_read_and_written(native: Path, tmp_path: Path) -> None:
    report = run(Dequantization(native, tmp_path / "out"))
    assert report["tensors"] == len(source_tensors(TINY.dims))
    assert report["bytes"] == sum(spec.nbytes for spec in source_tensors(TINY.dims))
    assert report["forms"]["MXFP4"] == 3 * 3 * TINY.n_routed_experts
    assert [block["block"] for block in report["blocks"]] == ["embed", "layers.0", "layers.1", "head", "mtp.0"]


# ------------------------------------------------------------------------------------------------ kills and resumes


@pytest.fixture(scope="module")
def changes(native: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run changes the disk."""
    job = Dequantization(native, tmp_path_factory.mktemp("count") / "out")
    return changes_of(lambda: run(job))


@pytest.mark.parametrize("part", [0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_run_killed_after_this_part_of_its_writes_is_finished_by_the_same_command(
    native: Path, whole: dict[str, str], changes: int, tmp_path: Path, part: float
) -> None:
    job = Dequantization(native, tmp_path / "out")
    assert killed(lambda: run(job), int(part * changes))
    run(job)
    assert digests(job.out) == whole


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5, 7, 9, 13, 25, 40])
def test_a_run_killed_this_few_writes_before_its_end_is_finished_by_the_same_command(
    native: Path, whole: dict[str, str], changes: int, tmp_path: Path, left: int
) -> None:
    job = Dequantization(native, tmp_path / "out")
    assert killed(lambda: run(job), changes - left)
    run(job)
    assert digests(job.out) == whole


def test_a_run_killed_again_and_again_gets_there_with_the_same_bytes(
    native: Path, whole: dict[str, str], changes: int, tmp_path: Path
) -> None:
    job, kills = Dequantization(native, tmp_path / "out"), 0
    while killed(lambda: run(job), changes // 3):
        kills += 1
    assert kills >= 2
    assert digests(job.out) == whole


def begun(native: Path, changes: int, out: Path) -> Dequantization:
    """A run that was killed when some blocks were done."""
    job = Dequantization(native, out)
    assert killed(lambda: run(job), changes * 3 // 4)
    return job


def journal_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ".dsv4q" / "journal.jsonl").read_bytes().splitlines()]


def test_a_finished_block_is_not_read_again(
    native: Path, changes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begun(native, changes, tmp_path / "out")
    done = {record["block"] for record in journal_of(job.out)[1:]}
    assert "layers.0" in done
    read: list[str] = []
    real = Checkpoint.read_part
    monkeypatch.setattr(Checkpoint, "read_part", lambda self, name, *to: (read.append(name), real(self, name, *to))[1])
    run(job)
    blocks = {part.name: spec.block for spec in source_tensors(TINY.dims) for part in stored_specs(spec)}
    # The plan looks at routing tables, whatever is finished.
    assert {blocks[name] for name in read if not name.endswith(".tid2eid")} == set(blocks.values()) - done


def test_no_resume_starts_over_and_gives_the_same_bytes(
    native: Path, whole: dict[str, str], changes: int, tmp_path: Path
) -> None:
    job = begun(native, changes, tmp_path / "out")
    run(replace(job, resume=False))
    assert digests(job.out) == whole


def test_resume_with_another_number_of_shards_is_refused(native: Path, changes: int, tmp_path: Path) -> None:
    error = refusal(replace(begun(native, changes, tmp_path / "out"), shards=2))
    assert isinstance(error, ResumeError) and "shards" in error.what


def test_resume_with_another_source_is_refused(native: Path, changes: int, tmp_path: Path) -> None:
    other = write_toy(tmp_path / "other", TINY, seed=1, form=native_form()).out
    error = refusal(replace(begun(native, changes, tmp_path / "out"), source=other))
    assert isinstance(error, ResumeError) and "source" in error.what


def test_a_shard_that_was_changed_meanwhile_is_named(native: Path, changes: int, tmp_path: Path) -> None:
    job = begun(native, changes, tmp_path / "out")
    shard = next(job.out.glob("model-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    error = refusal(job)
    assert isinstance(error, OutputError) and "model-00001" in str(error)


def test_a_finished_checkpoint_is_left_as_it_is_by_the_same_command(native: Path, tmp_path: Path) -> None:
    job = Dequantization(native, tmp_path / "out")
    first = run(job)
    stamps = {path: path.stat().st_mtime_ns for path in job.out.rglob("*")}
    assert run(job) == first
    assert {path: path.stat().st_mtime_ns for path in job.out.rglob("*")} == stamps


def test_a_finished_checkpoint_is_not_overwritten_by_another_one(native: Path, tmp_path: Path) -> None:
    job = Dequantization(native, tmp_path / "out")
    run(job)
    error = refusal(replace(job, shards=2))
    assert isinstance(error, OutputError) and "shards" in error.what


def test_an_unfinished_quantization_is_not_taken_over(native: Path, tmp_path: Path) -> None:
    Journal.open(tmp_path / "out", {"config": {}, "source": {}}, resume=True).close()
    error = refusal(Dequantization(native, tmp_path / "out"))
    assert isinstance(error, ResumeError) and "command" in error.what


# ------------------------------------------------------------------------------------------------ refusals


def test_a_bf16_source_is_refused_by_name(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    error = refusal(Dequantization(twins[1], tmp_path / "out"))
    assert isinstance(error, SourceError) and "nothing to dequantize" in error.what
    assert not (tmp_path / "out").exists()


def test_a_config_json_alone_is_refused(native: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copyfile(native / "config.json", tmp_path / "source" / "config.json")
    assert "no safetensors" in refusal(Dequantization(tmp_path / "source", tmp_path / "out")).what


def damaged(native: Path, to: Path, changed: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(native, to)
    edit(to, changed)
    return to


def test_a_missing_scale_is_named_before_anything_is_written(native: Path, tmp_path: Path) -> None:
    source = damaged(native, tmp_path / "source", {f"{EXPERT}.scale": None})
    error = refusal(Dequantization(source, tmp_path / "out"))
    assert isinstance(error, SourceError) and f"{EXPERT}.scale" in str(error)
    assert not (tmp_path / "out").exists()


def test_an_extra_tensor_is_named_before_anything_is_written(native: Path, tmp_path: Path) -> None:
    source = damaged(native, tmp_path / "source", {"layers.0.ghost": torch.zeros(1)})
    assert "layers.0.ghost" in str(refusal(Dequantization(source, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_nan_scale_stops_the_run_by_name_and_no_index_is_written(native: Path, tmp_path: Path) -> None:
    scale = tensors(native)[f"{EXPERT}.scale"]
    scale.view(torch.uint8)[0, 0] = 0xFF
    source = damaged(native, tmp_path / "source", {f"{EXPERT}.scale": scale})
    error = refusal(Dequantization(source, tmp_path / "out"))
    assert isinstance(error, WeightError) and EXPERT in str(error)
    assert not (tmp_path / "out" / INDEX).exists()
    assert [record["block"] for record in journal_of(tmp_path / "out")[1:]] == ["embed"]


def test_more_shards_than_pieces_are_refused(native: Path, tmp_path: Path) -> None:
    error = refusal(Dequantization(native, tmp_path / "out", shards=9999))
    assert isinstance(error, ConfigError) and error.where == "--shards"


def test_an_output_inside_the_source_is_refused(native: Path) -> None:
    assert isinstance(refusal(Dequantization(native, native / "out")), OutputError)
    assert not (native / "out").exists()


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(native: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cuda:99"):
        run(Dequantization(native, tmp_path / "out"), device="cuda:99")
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_refused(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4q.dequantize.free_bytes", lambda path: 1000)
    assert "too little free disk" in refusal(Dequantization(native, tmp_path / "out")).what


# ------------------------------------------------------------------------------------------------ planted defects


@pytest.mark.parametrize(
    "name", ["embed.weight", f"{EXPERT}.weight", "layers.1.attn.wo_b.weight", "mtp.0.ffn.experts.0.w1.weight"]
)
def test_a_flipped_bit_is_named(twins: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    tensor = tensors(twins[2])[name]
    tensor.view(torch.uint8)[1, 5] ^= 1
    result = judged(damaged(twins[2], tmp_path / "out", {name: tensor}), twins[0])
    assert [(d.check, d.tensor) for d in result.differences] == [("bytes", name)]


def test_a_negative_zero_that_lost_its_sign_is_named(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = tensors(twins[2])
    name = next(n for n, t in found.items() if ".experts." in n and bool((t.view(torch.int16) == -(2**15)).any()))
    result = judged(damaged(twins[2], tmp_path / "out", {name: found[name] + 0.0}), twins[0])
    assert [(d.check, d.tensor) for d in result.differences] == [("bytes", name)]


def test_a_scale_that_came_along_is_named(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = damaged(twins[2], tmp_path / "out", {f"{EXPERT}.scale": torch.zeros(2, 2)})
    differences = judged(out, twins[0]).differences
    assert [(d.check, d.tensor) for d in differences] == [("tensors", f"{EXPERT}.scale")]
