"""The benchmark scripts, at toy width on the CPU: that they measure what they say, not how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4q.checkpoint.source import scan
from dsv4q.made_up.toy import ToyConfig
from runs import CONFIGS

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_source import dimensions, first_layers, write_source  # noqa: E402

SMALL = ("--samples", "2", "--length", "32", "--micro-batch", "1", "--device", "cpu")


def run_script(name: str, *arguments: object, ranks: int = 1) -> str:
    """What a script prints, of several ranks under torchrun; an error shows its own message."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def layer_run(work: Path) -> tuple[str, dict[str, Any]]:
    """Tables and JSON of a run of bench_layer.py."""
    flags = ("--width", "toy", "--layers", 2, "--stock-layers", 1, "--stock-batches", 2, "--gigabytes", 0.002)
    text = run_script("bench_layer.py", work / "w", *SMALL, *flags, "--verify", "--json", work / "found.json")
    return text, json.loads((work / "found.json").read_text())


def test_bench_layer_measures_every_part_in_one_run(layer_run: tuple[str, dict[str, Any]]) -> None:
    found = layer_run[1]
    assert {"ceilings", "sink", "files", "verified", "stock 2"} <= found.keys()
    assert all(value > 0 for value in found["ceilings"].values())
    for name in ("sink", "files", "stock 2"):
        assert found[name]["peak_memory"]["host"] > 100e6


def test_bench_layer_prints_the_ratios_of_the_targets(layer_run: tuple[str, dict[str, Any]]) -> None:
    text = layer_run[0]
    for row in ("stock, batch 2 / dsv4q, sink", "floor / dsv4q, files", "written / write ceiling"):
        assert f"| {row} |" in text


def test_the_artifact_of_the_benchmark_verifies_and_is_exact(layer_run: tuple[str, dict[str, Any]]) -> None:
    found = layer_run[1]
    assert found["verified"]["differences"] == []
    for name in ("sink", "files"):
        assert (
            found[name]["errors"]["routed expert"] | {"exact": 48, "tensors": 48}
            == (found[name]["errors"]["routed expert"])
        )


def test_stock_is_timed_in_each_of_its_passes(layer_run: tuple[str, dict[str, Any]]) -> None:
    stock = layer_run[1]["stock 2"]
    assert len(stock["layers"]) == 1
    assert all(stock["layers"][0][part] > 0 for part in ("calibrate", "propagate", "compress"))
    assert stock["save"] > 0


def test_bench_layer_measures_each_number_of_ranks_and_compares_their_bytes(layer_run: object, work: Path) -> None:
    flags = ("--width", "toy", "--layers", 2, "--gigabytes", 0.1, "--no-stock", "--source", work / "w" / "source")
    text = run_script("bench_layer.py", work / "ranks", *SMALL, *flags, "--ranks", "1,2")
    lines = {found["measurement"]: found for line in text.splitlines() if line.startswith("{")
             for found in [json.loads(line)]}  # fmt: skip
    assert lines.keys() == {
        "ceilings",
        "ceilings of ranks",
        "ceilings of ranks x2",
        "sink",
        "sink x2",
        "files",
        "files x2",
    }
    assert all(len(block["ranks"]) == 2 for name in ("sink x2", "files x2") for block in lines[name]["blocks"])
    assert lines["sink x2"]["received_bytes"] == 2 * 8 * 3 * 128 * 256 * 2 / 2  # half of all experts of two layers
    assert lines["ceilings of ranks x2"]["exchange, 2 processes"] > 0
    assert "4 blocks, the bytes are the same for all." in text


def test_several_ranks_write_with_the_runs_own_writer(work: Path) -> None:
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps(ToyConfig().as_config_json()))
    flags = ("--source", work / "model", "--config", CONFIGS / "toy.yaml", "--layers", 2)
    found = [json.loads(run_script("bench_writes.py", work / "written", *flags, ranks=ranks)) for ranks in (1, 2)]
    assert [one["ranks"] for one in found] == [1, 2]
    assert found[0]["gigabytes"] == found[1]["gigabytes"] > 0 and len(found[1]["seconds"]) == 2
    assert not (work / "written").exists()


def test_a_whole_artifact_is_written_and_deleted_shard_by_shard(work: Path) -> None:
    (work / "whole").mkdir()
    (work / "whole" / "config.json").write_text(json.dumps(ToyConfig().as_config_json()))
    flags = ("--source", work / "whole", "--config", CONFIGS / "toy.yaml")
    layers = json.loads(run_script("bench_writes.py", work / "gone", *flags, "--layers", 5))
    whole = json.loads(run_script("bench_writes.py", work / "gone", *flags, "--whole"))
    # Embedding, head and draft besides, and the block around them.
    assert len(layers["seconds"]) == 5 < len(whole["seconds"]) and layers["gigabytes"] < whole["gigabytes"]
    assert not (work / "gone").exists()


def test_a_source_of_fewer_layers_is_made_of_the_same_files(layer_run: object, work: Path) -> None:
    whole, part = work / "w" / "source", work / "w" / "source-1"
    assert json.loads((part / "config.json").read_text())["num_hidden_layers"] == 1
    shards = {path.name for path in part.glob("*.safetensors")}
    assert shards == {p.name for p in whole.glob("*.safetensors") if not p.name.startswith("layers.1-")}
    assert all((part / name).samefile(whole / name) for name in shards)


@pytest.mark.parametrize("native", [False, True])
def test_a_source_and_one_of_fewer_of_its_layers_say_their_true_size(native: bool, tmp_path: Path) -> None:
    write_source(tmp_path / "all", dimensions("toy", 2), "cpu", native=native)
    for source in (tmp_path / "all", first_layers(tmp_path / "all", tmp_path / "some", 1)):
        index = json.loads((source / "model.safetensors.index.json").read_text())
        stored = sum(entry.nbytes for entry in scan(source).tensors.values())
        assert index["metadata"]["total_size"] == stored and len(index["weight_map"]) == len(scan(source).tensors)


def test_the_sink_keeps_no_shard_and_the_profile_names_what_took_time(layer_run: object, work: Path) -> None:
    text = run_script("bench_dsv4q.py", work / "w" / "source", work / "sink", *SMALL, "--sink", "--profile")
    found = json.loads(text.splitlines()[-1])
    assert not list((work / "sink").glob("*.safetensors*"))
    assert [block["block"] for block in found["blocks"]] == ["embed", "layers.0", "layers.1", "head"]
    assert found["profile"]["kernels"][0]["seconds"] > 0


def test_bench_cpu_compares_bytes_and_prints_both_sides(tmp_path: Path) -> None:
    text = run_script("bench_cpu.py", "--repeat", 1, "--experts", 0)
    rows = [line for line in text.splitlines() if line.startswith(("| toy experts", "| toy run, all"))]
    assert len(rows) == 3
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:5])


def test_bench_export_exports_both_ways_and_leaves_only_what_it_made(tmp_path: Path) -> None:
    flags = ("--layers", 2, "--width", "toy", "--device", "cpu", "--gigabytes", 0.002, "--made", tmp_path / "made")
    found = json.loads(run_script("bench_export.py", tmp_path / "work", *flags).splitlines()[-1])
    assert [one["layout"] for one in found] == ["modelopt", "compressed-tensors"]
    for one in found:
        assert one["gigabytes_per_second"] > 0 and one["share_of_before"] > 0 and one["share_of_after"] > 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["artifact", "source"]
    assert not list((tmp_path / "work").iterdir())


def test_whole_commands_are_measured_in_turns_with_those_of_another_checkout(work: Path) -> None:
    lines = ("--only", "dequantize-cpu,start", "--layers", 1, "--gigabytes", 0.002, "--touch", 0.05)
    settled = ("--width", "toy", "--device", "cpu", "--samples", 2, "--length", 32, "--before", SCRIPTS.parent)
    text = run_script(
        "bench_commands.py", work / "disk", "--made", work / "made", *lines, *settled, "--json", work / "commands.json"
    )
    found = json.loads((work / "commands.json").read_text())
    measured = ["dequantize-cpu now", "start now", "start before"]
    assert [f"{one['line']} {one['version']}" for one in found] == measured
    assert found[0]["command"].startswith(f"dsv4q dequantize {work / 'made' / 'source-1'} ")
    assert all(one["wall"] > 0 for one in found) and "| start | before |" in text
    touching = json.loads(text.splitlines()[0])
    assert len(touching["GB/s, first and second time"]) == 2 and not list((work / "made").glob("ceiling-*"))
    assert [path.name for path in (work / "disk").iterdir()] == ["model"]


def test_the_beginning_of_a_command_is_told_moment_by_moment(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(ToyConfig().as_config_json()))
    line = ["rehearse", tmp_path / "out", "--source", tmp_path / "model", "--config", CONFIGS / "toy.yaml"]
    command = [sys.executable, SCRIPTS / "bench_start.py", "--stop", *line, "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    moments = [line.partition(" of work: ") for line in done.stderr.splitlines() if " of work: " in line]
    names = [name.partition(" ")[0].strip(",") for _, _, name in moments]
    assert names == ["the", "torch", "the", "transformers", "llmcompressor", "model"]
    for times in zip(*([float(time.split()[0]) for time in times.split(",")] for times, _, _ in moments), strict=True):
        assert list(times) == sorted(times)
    assert done.stdout == ""
