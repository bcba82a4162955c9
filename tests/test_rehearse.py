"""Rehearsals at toy dimensions through the real entry: judged and dropped shards, kept and spoiled ones, leftovers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4q import rehearse as story
from dsv4q.__main__ import main
from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.native import open_source
from dsv4q.checkpoint.shards import PlannedShard
from dsv4q.checkpoint.writer import Data, ShardWriter
from dsv4q.config import load_config
from dsv4q.console import Console, Mode
from dsv4q.errors import OutputError, SourceError, UsageError
from dsv4q.layout import Dims
from dsv4q.made_up.cut import chosen_layers, cut_config
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.plan.plan import Plan
from dsv4q.quantize import Job
from dsv4q.quantize import begin as begin_run
from dsv4q.quantize import prepare as prepare_job
from dsv4q.rehearse import FLASH, Rehearsal, prepare, rehearse
from dsv4q.report.build import build_report
from dsv4q.run.dropping import Dropping
from dsv4q.run.ranks import Ranks
from dsv4q.run.run import run_blocks
from dsv4q.verify.judge import verify, verify_headers
from runs import CONFIGS, toy_job

TOY = load_config(CONFIGS / "toy.yaml")
FOUR = ToyConfig(compress_ratios=(0, 4, 128, 4), num_hash_layers=2)
QUIET = Console(Mode.QUIET)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the config.json of a toy of four layers and one MTP layer."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(FOUR.as_config_json()))
    return folder


@pytest.fixture(scope="module")
def kept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a rehearsal with --keep."""
    out = tmp_path_factory.mktemp("kept") / "out"
    assert (
        cli("rehearse", out, "-c", CONFIGS / "toy.yaml", "--source", source, "--device", "cpu", "--keep", "-q")[0] == 0
    )
    return out


def cli(*arguments: object) -> tuple[int, str]:
    """Exit code and stdout of the real entry point."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return stopped.value.code or 0, out.getvalue()  # type: ignore[return-value]


def run(out: Path, source: Path, **options: Any) -> dict[str, Any]:
    return rehearse(Rehearsal(out, TOY, source, device="cpu", **options), QUIET)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Shard file number -> tensor of which the first byte is turned over before the judge sees it."""
    wanted: dict[str, str] = {}
    submit = Dropping.submit

    def spoil(self: Dropping, shard: PlannedShard) -> None:
        for tensor, offset in shard.offsets():
            if tensor.name in wanted:
                with (self._out / shard.file).open("r+b") as file:
                    file.seek(offset)
                    byte = file.read(1)[0]
                    file.seek(offset)
                    file.write(bytes([byte ^ 0x11]))
        submit(self, shard)

    monkeypatch.setattr(Dropping, "submit", spoil)
    yield wanted


# ------------------------------------------------------------------------------------------------ the run


@pytest.mark.slow
def test_counts_are_the_plans_and_every_shard_is_judged_and_dropped(source: Path, tmp_path: Path) -> None:
    arguments = ("-c", CONFIGS / "toy.yaml", "--source", source, "--device", "cpu", "--json")
    code, text = cli("rehearse", tmp_path / "out", *arguments)
    result = json.loads(text)
    planned = json.loads(cli("plan", source, "-c", CONFIGS / "toy.yaml", "--json")[1])["artifact"]
    counts = result["counts"]
    assert (code, result["differences"], (tmp_path / "out").exists()) == (0, [], False)
    assert counts["shards"] == counts["shards_verified"] == len(planned["shards"]) == 4
    assert [counts[key] for key in ("tensors", "mtp_tensors", "bytes")] == [
        planned[key] for key in ("tensors", "mtp_tensors", "bytes")
    ]
    assert counts["exact"] == {"attention projection": 20, "routed expert": 96}


def test_an_empty_folder_that_was_there_stays_empty(source: Path, tmp_path: Path) -> None:
    run(tmp_path, source, layers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_rehearsal_is_an_artifact_that_the_other_judge_accepts(kept: Path) -> None:
    assert verify(kept, source=None, deep=True, progress=None).differences == ()
    assert "weights are not" in (kept / "README.md").read_text()


def test_two_rehearsals_give_the_same_shards(kept: Path, source: Path, tmp_path: Path) -> None:
    run(tmp_path / "again", source, keep=True)
    shards = sorted(path.name for path in kept.glob("*.safetensors"))
    assert len(shards) == 4
    assert [n for n in shards if (kept / n).read_bytes() != (tmp_path / "again" / n).read_bytes()] == []


def test_nothing_changes_the_dtype_that_all_threads_compute_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", changed.append)
    run(tmp_path / "out", source, layers=1, native=True)
    assert changed == []


def test_native_weights_give_the_shards_of_the_plain_ones(kept: Path, source: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", source, native=True, keep=True)
    assert result["report"]["source"]["forms"].keys() >= {"MXFP4", "FP8"}
    assert (result["differences"], result["counts"]["exact"]) == ([], {"attention projection": 20, "routed expert": 96})
    shards = [path.name for path in kept.glob("*.safetensors")]
    assert [n for n in shards if (kept / n).read_bytes() != (tmp_path / "out" / n).read_bytes()] == []


def test_the_reading_that_a_real_run_adds_is_that_of_the_layout(source: Path, tmp_path: Path) -> None:
    plain, native = (run(tmp_path / name, source, layers=1, native=name == "native") for name in ("plain", "native"))
    assert plain["real_run"]["source_bytes"] > 2 * native["real_run"]["source_bytes"]


def test_unjudged_shards_are_written_and_dropped(spoiled: dict[str, str], source: Path, tmp_path: Path) -> None:
    spoiled["head.weight"] = "a judge would see it"
    arguments = ("-c", CONFIGS / "toy.yaml", "--source", source, "--device", "cpu", "--no-judge")
    code, text = cli("rehearse", tmp_path / "out", *arguments)
    assert (code, (tmp_path / "out").exists()) == (0, False)
    assert "4 shards written, not verified" in text and "judged" not in text


def test_an_unjudged_rehearsal_may_be_kept(source: Path, kept: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", source, judged=False, keep=True)
    assert result["counts"] == {"shards": 4}
    assert verify(tmp_path / "out", source=None, deep=True, progress=None).differences == ()


def test_a_recipe_that_rounds_is_judged_too(source: Path, tmp_path: Path) -> None:
    minmax = load_config(CONFIGS / "nvfp4-fp8-mtp-minmax.yaml")
    config = minmax.model_copy(update={"calibration": TOY.calibration, "output": TOY.output})
    counts = rehearse(Rehearsal(tmp_path / "out", config, source, 2, device="cpu"), QUIET)["counts"]
    assert counts["difference_count"] == 0
    assert counts["inexact"]["routed expert"]["max_relative_error"] > 0.01


def test_a_config_of_integers_is_judged_too(source: Path, tmp_path: Path) -> None:
    integers = load_config(CONFIGS / "w4a16-fp8-mtp.yaml").model_copy(update={"output": TOY.output})
    counts = rehearse(Rehearsal(tmp_path / "out", integers, source, 2, device="cpu"), QUIET)["counts"]
    assert (counts["difference_count"], counts["inexact"]["routed expert"]["tensors"]) == (0, 48)


@pytest.mark.parametrize(
    ("tensor", "check"),
    [
        ("layers.1.ffn.experts.2.w1.weight_packed", "encoding"),
        ("layers.1.ffn.experts.2.w1.weight_scale", "encoding"),
        ("layers.2.attn.wkv.weight", "encoding"),
        ("layers.3.ffn.experts.7.w3.input_global_scale", "pairs"),
        ("layers.0.ffn.gate.tid2eid", "bytes"),
        ("mtp.0.ffn.experts.1.w2.weight", "bytes"),
        ("mtp.0.head.weight", "bytes"),
        ("embed.weight", "bytes"),
    ],
)
def test_a_spoiled_byte_is_found(
    tensor: str, check: str, spoiled: dict[str, str], source: Path, tmp_path: Path
) -> None:
    spoiled[tensor] = check
    differences = run(tmp_path / "out", source)["differences"]
    module = tensor.rpartition(".")[0]
    assert check in {d["check"] for d in differences}
    assert {d["tensor"].startswith(module) for d in differences} == {True}


@pytest.mark.slow
def test_a_difference_ends_with_exit_code_3(spoiled: dict[str, str], source: Path, tmp_path: Path) -> None:
    spoiled["head.weight"] = ""
    arguments = ("-c", CONFIGS / "toy.yaml", "--source", source, "--device", "cpu", "--layers", 1)
    code, text = cli("rehearse", tmp_path / "out", *arguments)
    assert code == 3
    assert "DIFFERENCE bytes: head.weight in model-" in text
    assert not (tmp_path / "out").exists()


def test_a_shard_with_another_header_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Dropping.submit

    def rename(self: Dropping, shard: PlannedShard) -> None:
        path = self._out / shard.file
        path.write_bytes(path.read_bytes().replace(b"ffn.gate.bias", b"ffn.gate.baas"))
        submit(self, shard)

    monkeypatch.setattr(Dropping, "submit", rename)
    found = {(d["check"], d["found"]) for d in run(tmp_path / "out", source)["differences"]}
    assert ("headers", "another one") in found
    assert ("tensors", "no such tensor in any shard") in found


def test_shards_on_disk_are_as_many_as_planned_at_most(source: Path, tmp_path: Path) -> None:
    config = TOY.model_copy(update={"output": TOY.output.model_copy(update={"shards": 40})})
    result = rehearse(Rehearsal(tmp_path / "out", config, source, device="cpu"), QUIET)
    whole = sum(shard["bytes"] for shard in result["report"]["artifact"]["shards"])
    needed = result["planned"]["disk_bytes"]
    assert needed < whole + 2 * 1024 * 4 * 256 * 2  # the artifact and its residual streams
    assert 0 < result["peak"]["disk"] < needed + 200_000  # files take whole blocks; the work folder has small ones


def planned_shards(out: Path, count: int) -> list[PlannedShard]:
    """So many shards of a few bytes in `out`."""
    out.mkdir()
    for number in range(count):
        (out / f"{number}.safetensors").write_bytes(b"shard")
    return [PlannedShard(f"{number}.safetensors", ()) for number in range(count)]


def test_two_shards_that_nobody_judges_are_deleted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, unlink = threading.Barrier(2), Path.unlink

    def meet(path: Path) -> None:
        both.wait(timeout=30)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", meet)
    shards = planned_shards(tmp_path / "out", 4)
    with Dropping(None, tmp_path / "out", 0, keep=False) as dropping:
        for shard in shards:
            dropping.submit(shard)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_is_deleted_while_files_are_counted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = planned_shards(tmp_path / "out", 2)
    stat = Path.stat

    def late(path: Path, **arguments: bool) -> os.stat_result:
        if path.name == shards[0].file:
            path.unlink(missing_ok=True)
        return stat(path, **arguments)

    monkeypatch.setattr(Path, "stat", late)
    with Dropping(None, tmp_path / "out", 0, keep=True) as dropping:
        dropping.submit(shards[1])
    assert 0 < dropping.peak == stat(tmp_path / "out" / shards[1].file).st_blocks * 512


# ------------------------------------------------------------------------------------------------ blocks alone


class Discard(ShardWriter):
    """Keeps nothing."""

    def put_all(self, tensors: Iterable[tuple[str, Data]]) -> None:
        list(tensors)

    def sync(self, block: str) -> str:
        return ""

    def finish_blocks(self, blocks: Iterable[str]) -> list[str]:
        return []


def quantize_blocks(job: Job, make_writer: type[ShardWriter] = ShardWriter) -> dict[str, Any]:
    """The blocks of a job, without what makes an artifact of its shards; the run's report."""
    with open_source(job.source) as source:
        run = replace(begin_run(job, prepare_job(job), source, Ranks()), make_writer=make_writer)
        journal = Journal.open(job.out, run.identity(), resume=False)
        try:
            peaks = run_blocks(run, journal, QUIET)
            journal.remove()
        finally:
            journal.close()
    return build_report(run.plan, journal.done, run.identity(), run.data, seconds=1.0, peaks=peaks)


def test_blocks_alone_write_what_their_writer_writes_and_no_artifact(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    report = quantize_blocks(job)
    assert sorted(path.name for path in job.out.iterdir()) == [
        f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    assert [block["block"] for block in report["blocks"]] == list(planned_blocks(job))


def test_a_writer_from_outside_may_throw_the_bytes_away(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    report = quantize_blocks(job, Discard)
    assert list(job.out.iterdir()) == []
    assert report["errors"]["routed expert"]["tensors"] == 120


def planned_blocks(job: Job) -> tuple[str, ...]:
    return prepare_job(replace(job, out=job.out.with_name("other"))).blocks


# ------------------------------------------------------------------------------------------------ calibration


def test_without_a_tokenizer_it_calibrates_on_random_tokens_and_says_so(source: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", source, layers=1)
    assert "random token ids, for chat_samples.jsonl" in result["rehearsal"]["calibration"]
    assert result["report"]["calibration"]["tokens"] == TOY.calibration.tokens  # type: ignore[union-attr]


def test_local_data_and_tokenizer_are_used(tmp_path: Path) -> None:
    write_toy(tmp_path / "source", FOUR)
    for shard in (tmp_path / "source").glob("*.safetensors*"):
        shard.unlink()
    result = run(tmp_path / "out", tmp_path / "source", layers=1)
    assert "chat_samples.jsonl" in result["rehearsal"]["calibration"]
    assert "random" not in result["rehearsal"]["calibration"]


def test_random_tokens_hang_on_the_spec_alone(source: Path, tmp_path: Path) -> None:
    prepared = prepare(Rehearsal(tmp_path / "out", TOY, source))
    first, again = (story.calibration(Rehearsal(tmp_path / "out", TOY, source), prepared.plan) for _ in range(2))
    assert first is not None and again is not None
    assert first.digest == again.digest
    assert [tuple(batch.shape) for batch in first.batches] == [(4, 128), (4, 128)]


# ------------------------------------------------------------------------------------------------ layers


def flash(layers: int | None, out: Path) -> Plan:
    return prepare(Rehearsal(out, load_config(CONFIGS / "nvfp4-fp8-mtp.yaml"), FLASH, layers)).plan


def test_the_packaged_config_is_deepseek_v4_flash(tmp_path: Path) -> None:
    plan = flash(None, tmp_path / "out")
    mtp = sum(tensor.name.startswith("mtp.") for tensor in plan.tensors)
    assert (len(plan.tensors), mtp, len(plan.shards)) == (134_309, 799, 35)
    assert plan.estimate.disk < plan.artifact_bytes / 4


def test_fewer_layers_make_fewer_shards_of_the_same_size(tmp_path: Path) -> None:
    plan = flash(5, tmp_path / "out")
    assert len(plan.shards) == 7  # 36.5 of 181.3 GB in 35
    assert sum(tensor.name.startswith("mtp.") for tensor in plan.tensors) == 799


@pytest.mark.parametrize(("count", "layers"), [(1, [0]), (3, [0, 2, 3]), (4, [0, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])])
def test_the_first_layer_of_each_kind_comes_first(count: int, layers: list[int]) -> None:
    dims = Dims.from_config(json.loads((FLASH / "config.json").read_text()))
    assert list(chosen_layers(dims, count)) == layers


def test_a_cut_config_describes_the_chosen_layers() -> None:
    whole = json.loads((FLASH / "config.json").read_text())
    cut = cut_config(whole, [0, 2, 3])
    assert (cut["compress_ratios"], cut["num_hidden_layers"], cut["num_hash_layers"]) == ([0, 4, 128, 0], 3, 2)
    assert cut["num_nextn_predict_layers"] == 1
    assert whole["num_hidden_layers"] == 43


@pytest.mark.parametrize("count", [0, 5])
def test_a_number_of_layers_that_the_model_has_not_is_refused(count: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not so many layers"):
        prepare(Rehearsal(tmp_path / "out", TOY, source, count))


# ------------------------------------------------------------------------------------------------ OUT


def test_a_folder_with_foreign_files_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run(tmp_path, source)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_finished_artifact_is_refused_and_untouched(kept: Path, source: Path) -> None:
    with pytest.raises(OutputError, match="not an interrupted rehearsal"):
        run(kept, source)
    assert verify_headers(kept).ok


def test_an_unfinished_quantize_run_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    work = tmp_path / ".dsv4q"
    work.mkdir()
    (work / "journal.jsonl").write_text('{"config": {}}\n{"block": "embed"}\n')
    (tmp_path / "model-00001-of-00002.safetensors.partial").write_bytes(b"precious")
    with pytest.raises(OutputError, match="not an interrupted rehearsal"):
        run(tmp_path, source)
    assert (tmp_path / "model-00001-of-00002.safetensors.partial").read_bytes() == b"precious"


def test_what_a_killed_rehearsal_left_is_replaced(source: Path, tmp_path: Path) -> None:
    work = tmp_path / ".dsv4q"
    work.mkdir()
    (work / "journal.jsonl").write_text('{"rehearsal": true}\n{"block": "embed"}\n')
    (work / "streams.embed").write_bytes(b"old")
    (tmp_path / "model-00001-of-00007.safetensors.partial").write_bytes(b"old")
    assert run(tmp_path, source, layers=1)["differences"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_that_fails_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ShardWriter, block: str) -> str:
        raise OutputError("The disk is gone", where=block)

    monkeypatch.setattr(ShardWriter, "sync", broken)
    with pytest.raises(OutputError, match="The disk is gone"):
        run(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_ends_early_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Dropping.submit

    def cut(self: Dropping, shard: PlannedShard) -> None:
        with (self._out / shard.file).open("r+b") as file:
            file.truncate(shard.nbytes - 1)
        submit(self, shard)

    monkeypatch.setattr(Dropping, "submit", cut)
    assert {d["check"] for d in run(tmp_path / "out", source)["differences"]} == {"headers"}


@pytest.mark.slow
def test_a_shard_that_goes_away_ends_the_run_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = Dropping.submit

    def lose(self: Dropping, shard: PlannedShard) -> None:
        (self._out / shard.file).unlink()
        submit(self, shard)

    monkeypatch.setattr(Dropping, "submit", lose)
    arguments = ("-c", CONFIGS / "toy.yaml", "--source", source, "--device", "cpu", "-q")
    assert cli("rehearse", tmp_path / "out", *arguments)[0] == 1
    assert "model-00004-of-00004.safetensors" in capsys.readouterr().err  # the draft's, which is whole first
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_refused_before_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "free_bytes", lambda path: 1000)
    code, _ = cli("rehearse", tmp_path / "out", "-c", CONFIGS / "toy.yaml", "--source", source)
    assert (code, (tmp_path / "out").exists()) == (1, False)


def test_a_source_that_is_no_deepseek_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError, match="not a DeepSeek-V4"):
        run(tmp_path / "out", tmp_path / "source" / "config.json")
