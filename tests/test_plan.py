"""The plan: counts and bytes of the published artifact, headers, shards, problems; skeletons on disk."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dsv4q.checkpoint.native import as_source
from dsv4q.checkpoint.shards import _cuts
from dsv4q.checkpoint.source import scan
from dsv4q.config import Config, DraftChoice, Output, load_config, parse_config
from dsv4q.errors import ConfigError, Dsv4qError, OutputError, RecipeError, SourceError
from dsv4q.layout import DTYPE_BYTES
from dsv4q.made_up.generated import GeneratedCheckpoint
from dsv4q.made_up.packed import PackedCheckpoint
from dsv4q.made_up.toy import ToyConfig
from dsv4q.plan.plan import Plan, make_plan
from dsv4q.plan.small_files import write_skeleton
from dsv4q.verify.judge import verify_headers
from runs import CONFIGS, FLASH

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
GB = 1e9


def shipped(name: str = "nvfp4-fp8-mtp", **changes: Any) -> Config:
    return load_config(CONFIGS / f"{name}.yaml").model_copy(update=changes)


def plan_of(config_json: dict[str, Any], folder: Path, config: Config) -> Plan:
    """Plan for a folder with just this config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    with scan(folder) as checkpoint:
        return make_plan(checkpoint, config)


def toy_plan(folder: Path, config: Config | None = None, **changes: Any) -> Plan:
    toy = ToyConfig(**changes)
    return plan_of(toy.as_config_json(), folder / "source", config or shipped("toy"))


@cache
def flash(name: str, head_copies: bool | None = None) -> Plan:
    """Plan for DeepSeek-V4-Flash with a shipped config, as it is or with other `draft.shared_head_copies`."""
    config = shipped(name) if head_copies is None else shipped(name, draft=DraftChoice(shared_head_copies=head_copies))
    with scan(FLASH) as checkpoint:
        return make_plan(checkpoint, config)


@pytest.fixture(scope="module")
def full() -> Plan:
    """The published artifact."""
    return flash("nvfp4-fp8-mtp")


# ----------------------------------------------------------------------------------------------- the full size


@pytest.mark.parametrize(
    ("plan", "tensors", "mtp", "shards", "size"),
    [
        (("nvfp4-fp8-mtp",), 134_309, 799, 35, 181.27),
        (("nvfp4-fp8-mtp", False), 134_307, 797, 35, 179.15),
        (("nvfp4-fp8-mtp-minmax",), 134_309, 799, 35, 181.27),
        (("nvfp4-fp8",), 133_510, 0, 35, 165.93),
        (("w4a16-fp8-mtp",), 101_285, 799, 35, 168.29),
        (("toy",), 134_309, 799, 4, 181.27),
    ],
    ids=str,
)
def test_the_artifact_of_deepseek_v4_flash_has_these_tensors_and_bytes(
    plan: tuple[Any, ...], tensors: int, mtp: int, shards: int, size: float
) -> None:
    facts = flash(*plan).as_dict()
    assert facts["problems"] == []
    model = facts["source"]["model"]
    assert model["tensors"] == 35_020 and round(model["bytes"] / GB, 2) == 581.98
    artifact = facts["artifact"]
    assert (artifact["tensors"], artifact["mtp_tensors"], len(artifact["shards"])) == (tensors, mtp, shards)
    assert round(artifact["bytes"] / GB, 2) == size


@pytest.mark.parametrize(
    "name", [name for name in SHIPPED if "For DeepSeek-V4-Flash" in (CONFIGS / f"{name}.yaml").read_text()]
)
def test_the_figures_in_the_head_of_a_config_are_those_of_its_plan(name: str) -> None:
    words = re.search(r"# For DeepSeek-V4-Flash: (.*)\.", (CONFIGS / f"{name}.yaml").read_text())
    assert words is not None
    plan = flash(name)
    assert words[1].startswith(f"{len(plan.tensors):,} tensors, ")
    assert words[1].endswith(f"{len(plan.shards)} shards, {plan.artifact_bytes / GB:.2f} GB")


def test_classes_of_the_published_artifact_are_those_of_the_contract(full: Plan) -> None:
    facts = full.as_dict()
    classes = facts["artifact"]["classes"]
    assert facts["artifact"]["quantized_linears"] == {"attention": 215, "experts": 33_024}
    experts, attention = classes["routed expert"], classes["attention projection"]
    assert (experts["tensors"], round(experts["bytes"] / GB, 2)) == (132_096, 155.83)
    assert (attention["tensors"], round(attention["bytes"] / GB, 2)) == (430, 4.60)


def test_one_main_layer_has_the_bytes_of_the_contract(full: Plan) -> None:
    read = sum(s.nbytes for s in full.source_specs if s.block == "layers.21")
    written = sum(t.nbytes for t in full.block_tensors("layers.21"))
    assert (round(read / GB, 2), round(written / GB, 2)) == (13.16, 3.80)


def test_everything_but_the_quantized_linears_keeps_dtype_and_shape(full: Plan) -> None:
    kept = [t for t in full.tensors if not t.encoded]
    assert all((t.dtype, t.shape) == (t.spec.dtype, t.spec.shape) for t in kept)
    copies = {t.name: t.spec.name for t in kept if t.name != t.spec.name}
    assert copies == {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}


def test_without_mtp_no_mtp_tensor_is_planned_and_config_json_says_so(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, shipped("nvfp4-fp8", output=Output(shards=2)))
    assert not [t.name for t in plan.tensors if t.name.startswith("mtp.")]
    assert plan.artifact_config["num_nextn_predict_layers"] == 0 and plan.draft == "mtp"


def test_config_json_keeps_every_key_of_the_source(full: Plan) -> None:
    source = json.loads(FLASH.read_text())
    made = {key: value for key, value in full.artifact_config.items() if key != "quantization_config"}
    assert made == {key: value for key, value in source.items() if key != "quantization_config"}
    assert full.artifact_config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_quantization_config_of_the_source_is_replaced(tmp_path: Path) -> None:
    stale = {**ToyConfig().as_config_json(), "quantization_config": {"quant_method": "fp8", "stale": True}}
    plan = plan_of(stale, tmp_path / "source", shipped("toy"))
    assert "stale" not in plan.artifact_config["quantization_config"]


def test_planning_the_full_size_imports_neither_torch_nor_transformers_and_reads_no_tensor() -> None:
    code = (
        "import sys; from dsv4q.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'transformers', 'llmcompressor', 'compressed_tensors', 'safetensors'} "
        "& set(sys.modules)), file=sys.stderr)"
    )
    arguments = ["plan", str(FLASH), "--config", str(CONFIGS / "nvfp4-fp8-mtp.yaml"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["artifact"]["tensors"] == 134_309


# ----------------------------------------------------------------------------------------------- needs


def test_disk_needed_is_the_shards_and_two_copies_of_the_residual_streams(full: Plan) -> None:
    streams = 64 * 512 * 4 * 4096 * 2
    assert full.estimate.disk == sum(s.nbytes for s in full.shards) + 2 * streams


def test_memory_needed_is_a_few_blocks_whatever_the_number_of_layers(tmp_path: Path) -> None:
    few, many = (toy_plan(tmp_path, compress_ratios=(4, 128) * n).estimate for n in (2, 6))
    assert (few.host, few.gpu) == (many.host, many.gpu)


def test_memory_needed_holds_a_main_layer_and_what_is_made_of_it(tmp_path: Path) -> None:
    bf16 = {key: value for key, value in json.loads(FLASH.read_text()).items() if key != "quantization_config"}
    full = plan_of(bf16, tmp_path, shipped())
    least, most = full.estimate.gpu_least, full.estimate.gpu[0].nbytes
    assert 13.16e9 + 3.80e9 < least < full.estimate.host < 40e9
    assert least + 12.9e9 < most < 45e9


def test_memory_needed_for_the_official_files_is_known_by_their_config_alone(full: Plan) -> None:
    there = PackedCheckpoint.of(GeneratedCheckpoint.of(json.loads(FLASH.read_text()), FLASH))
    assert make_plan(as_source(there), shipped()).estimate == full.estimate
    assert full.estimate.gpu_least < 3.8e9 + 3.4e9 + 4.1e9 < full.estimate.gpu[0].nbytes < 26e9


def test_a_larger_micro_batch_needs_more_memory_and_no_more_disk(tmp_path: Path) -> None:
    toy = shipped("toy").calibration
    assert toy is not None
    batches = (toy.model_copy(update={"micro_batch": n}) for n in (1, 8))
    small, large = (toy_plan(tmp_path, shipped("toy", calibration=c)).estimate for c in batches)
    assert small.gpu_least < large.gpu_least and small.host < large.host and small.disk == large.disk


def test_a_large_calibration_set_is_spilled_to_disk_within_four_blocks_of_host_memory() -> None:
    wanted = shipped("nvfp4-fp8-mtp").calibration
    assert wanted is not None
    large = wanted.model_copy(update={"samples": 512, "max_length": 2048, "micro_batch": 4})
    with scan(FLASH) as checkpoint:
        found = make_plan(checkpoint, shipped("nvfp4-fp8-mtp", calibration=large)).estimate
        usual = make_plan(checkpoint, shipped("nvfp4-fp8-mtp")).estimate
    assert (found.streams, found.streams_elsewhere) == (512 * 2048 * 4 * 4096 * 2, "on disk")
    assert usual.streams_elsewhere == "in host memory"
    assert found.host < 53e9 and found.disk - usual.disk == 3 * found.streams - 2 * usual.streams


def test_a_recipe_without_calibration_counts_no_tokens_and_no_streams() -> None:
    plan = flash("w4a16-fp8-mtp")
    assert plan.estimate.calibration_tokens == 0
    assert plan.estimate.disk == sum(s.nbytes for s in plan.shards)


# ----------------------------------------------------------------------------------------------- shards and headers


sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=60)


@given(sizes=sizes, data=st.data())
def test_cuts_give_exactly_so_many_parts_none_empty_each_within_one_piece_of_its_share(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    ends = _cuts(sizes, count)
    assert len(ends) == count and ends[-1] == len(sizes)
    parts = [sizes[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert all(parts) and [size for part in parts for size in part] == sizes
    assert all(abs(sum(part) - sum(sizes) / count) <= max(sizes) for part in parts)


@pytest.mark.parametrize(
    ("sizes", "count", "ends"),
    [([2, 9, 1], 2, [1, 3]), ([1, 9, 2], 2, [2, 3]), ([4, 4, 4, 4], 2, [2, 4]), ([9, 1, 1], 3, [1, 2, 3])],
)
def test_a_cut_is_the_boundary_nearest_to_its_ideal_place(sizes: list[int], count: int, ends: list[int]) -> None:
    assert _cuts(sizes, count) == ends


def test_shards_of_the_published_artifact_are_balanced_and_follow_the_layers(full: Plan) -> None:
    share = full.artifact_bytes / 35
    embedding = 129_280 * 4096 * 2
    assert all(abs(s.data_bytes - share) < embedding for s in full.shards)
    for one, other in pairwise(full.shards):
        last = max(full.blocks.index(t.block) for t in one.tensors)
        assert last <= min(full.blocks.index(t.block) for t in other.tensors)


def test_no_expert_is_spread_over_two_shards(full: Plan) -> None:
    place: dict[tuple[str, int], set[str]] = {}
    for shard in full.shards:
        for tensor in shard.tensors:
            if tensor.spec.expert is not None:
                place.setdefault((tensor.block, tensor.spec.expert), set()).add(shard.file)
    assert len(place) == 44 * 256 and all(len(files) == 1 for files in place.values())


@pytest.mark.parametrize("count", [1, 2, 35])
def test_headers_are_aligned_and_tile_the_data(tmp_path: Path, count: int) -> None:
    plan = toy_plan(tmp_path, shipped(output=Output(shards=count)))
    assert [s.file for s in plan.shards] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for shard in plan.shards:
        header = json.loads(shard.header[8:])
        assert len(shard.header) == 8 + int.from_bytes(shard.header[:8], "little") and len(shard.header) % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        at = 0
        for (name, entry), (tensor, offset) in zip(header.items(), shard.offsets(), strict=True):
            begin, end = entry["data_offsets"]
            assert name == tensor.name and begin == at and offset == len(shard.header) + at
            assert end - begin == math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]
            assert offset % DTYPE_BYTES[entry["dtype"]] == 0
            at = end
        assert at == shard.data_bytes and len(shard.header) + at == shard.nbytes


def test_the_index_names_every_tensor_once_with_its_shard(full: Plan) -> None:
    index = full.index()
    assert index["metadata"] == {"total_size": full.artifact_bytes}
    assert len(index["weight_map"]) == len(full.tensors) == 134_309
    assert all(index["weight_map"][t.name] == s.file for s in full.shards for t in s.tensors)


def test_blocks_share_out_all_tensors(full: Plan) -> None:
    assert full.blocks == ("embed", *(f"layers.{n}" for n in range(43)), "head", "mtp.0")
    assert sum(len(full.block_tensors(b)) for b in full.blocks) == len(full.tensors)


def test_more_shards_than_pieces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="More shards") as caught:
        toy_plan(tmp_path, shipped(output=Output(shards=5000)))
    most = int(str(caught.value.expected).removeprefix("at most "))
    assert len(toy_plan(tmp_path, shipped(output=Output(shards=most))).shards) == most


# ----------------------------------------------------------------------------------------------- skeletons


@pytest.mark.parametrize("name", SHIPPED)
def test_safetensors_reads_a_skeleton_as_planned(tmp_path: Path, name: str) -> None:
    plan = toy_plan(tmp_path, shipped(name, output=Output(shards=3)))
    write_skeleton(tmp_path / "out", tmp_path / "source", plan)
    for shard in plan.shards:
        with safe_open(tmp_path / "out" / shard.file, framework="pt") as file:
            assert set(file.keys()) == {t.name for t in shard.tensors}
            for tensor in shard.tensors:
                found = file.get_slice(tensor.name)
                assert (found.get_dtype(), tuple(found.get_shape())) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_judge_finds_nothing_wrong_in_the_headers_of_a_skeleton(tmp_path: Path, name: str) -> None:
    plan = toy_plan(tmp_path, shipped(name, output=Output(shards=3)))
    write_skeleton(tmp_path / "out", tmp_path / "source", plan)
    assert verify_headers(tmp_path / "out").differences == ()


def test_a_skeleton_is_complete_but_for_the_data(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    out = tmp_path / "out"
    write_skeleton(out, tmp_path / "source", plan)
    assert json.loads((out / "model.safetensors.index.json").read_text()) == plan.index()
    assert json.loads((out / "config.json").read_text()) == plan.artifact_config
    assert {p.name for p in out.iterdir()} == {
        *(s.file for s in plan.shards), "model.safetensors.index.json", "config.json", "recipe.yaml", "README.md",
    }  # fmt: skip


def test_files_of_a_skeleton_are_readable_for_all_under_any_umask(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    before = os.umask(0o077)
    try:
        write_skeleton(tmp_path / "out", tmp_path / "source", plan)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o644}


def test_the_full_size_skeleton_has_35_sparse_shards_with_134309_tensors(full: Plan, tmp_path: Path) -> None:
    write_skeleton(tmp_path / "out", FLASH, full)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 35 and sum(p.stat().st_size for p in shards) == sum(s.nbytes for s in full.shards)
    assert sum(p.stat().st_blocks * 512 for p in shards) < 64e6
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 134_309
    assert verify_headers(tmp_path / "out").ok


def test_a_skeleton_needs_an_empty_folder(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="empty folder"):
        write_skeleton(tmp_path / "out", tmp_path / "source", plan)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_skeleton_inside_the_source_is_refused(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path)
    with pytest.raises(OutputError, match="overlap"):
        write_skeleton(tmp_path / "source" / "skeleton", tmp_path / "source", plan)
    assert not (tmp_path / "source" / "skeleton").exists()


# ----------------------------------------------------------------------------------------------- problems


def only(plan: Plan) -> Dsv4qError:
    (problem,) = plan.problems
    return problem


def test_keeping_an_mtp_block_that_the_source_does_not_have_is_a_problem(tmp_path: Path) -> None:
    problem = only(toy_plan(tmp_path, num_nextn_predict_layers=0))
    assert isinstance(problem, ConfigError) and problem.where == "draft.keep"


def test_a_source_without_mtp_is_fine_for_a_config_without_it(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, shipped("nvfp4-fp8", output=Output(shards=2)), num_nextn_predict_layers=0)
    assert not plan.problems and plan.draft == "none"


def test_two_mtp_layers_get_two_pairs_of_head_copies(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, num_nextn_predict_layers=2)
    copies = {t.name for t in plan.tensors if t.name != t.spec.name and not t.encoded}
    assert copies == {f"mtp.{n}.{suffix}" for n in (0, 1) for suffix in ("emb.tok_emb.weight", "head.weight")}


def test_a_group_that_does_not_divide_the_columns_is_a_problem_for_each_shape(tmp_path: Path) -> None:
    plan = toy_plan(tmp_path, shipped("w4a16-fp8-mtp", output=Output(shards=2)), moe_intermediate_size=64)
    problem = only(plan)
    assert isinstance(problem, RecipeError) and problem.where == "layers.0.ffn.experts.0.w2.weight"
    assert "layers.0.ffn.experts.0.w2.weight" in str(problem)


def test_problems_of_the_recipe_are_in_the_plan(tmp_path: Path) -> None:
    only_w1 = {
        "targets": [r"re:model\..*\.mlp\.experts\.\d+\.gate_proj$"],
        "weights": {"num_bits": 4, "group_size": 128},
    }
    arguments = {"QuantizationModifier": {"config_groups": {"a": only_w1}}}
    raw = {"recipe": {"a_stage": {"a_modifiers": arguments}}, "output": {"shards": 2}}
    problems = toy_plan(tmp_path, parse_config(raw)).problems
    assert len(problems) == 5 and "splits modules" in str(problems[0])


def test_bounds_are_refused_for_linears_that_have_none(tmp_path: Path) -> None:
    modules = (r"mlp\.experts\.\d+\.(gate|up|down)_proj", r"self_attn\.(q_a_proj|kv_proj)")
    linears = [rf"re:model\.layers\.\d+\.{module}$" for module in modules]
    modifier = {"QuantizationModifier": {"scheme": {"NVFP4": linears}}}
    raw = {"recipe": {"a_stage": {"a_modifiers": modifier}}, "activations": "bound", "output": {"shards": 2}}
    problem = only(toy_plan(tmp_path, parse_config(raw)))
    assert isinstance(problem, ConfigError) and "no analytic bound" in str(problem)
    assert "the first layers.0.attn.w" in str(problem)


def test_problems_of_the_source_come_first(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text("{")
    plan = toy_plan(tmp_path)
    assert isinstance(plan.problems[0], SourceError) and "index" in str(plan.problems[0])


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="deepseek_v4"):
        plan_of({**ToyConfig().as_config_json(), "model_type": "llama"}, tmp_path / "source", shipped("toy"))


def test_a_plan_as_dict_is_plain_json(full: Plan) -> None:
    facts = replace(full, problems=(ConfigError("x", where="y"),)).as_dict()
    assert json.loads(json.dumps(facts)) == facts and facts["problems"][0]["what"] == "x"


def test_shards_and_classes_of_the_json_agree(full: Plan) -> None:
    artifact = full.as_dict()["artifact"]
    assert sum(s["tensors"] for s in artifact["shards"]) == artifact["tensors"]
    assert sum(c["bytes"] for c in artifact["classes"].values()) == artifact["bytes"]
    mtp = sum(c["bytes"] for name, c in artifact["classes"].items() if name.startswith("mtp"))
    head_copies = 2 * 129_280 * 4096 * 2
    assert mtp + head_copies == artifact["mtp_bytes"]
