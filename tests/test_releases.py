"""The published releases: their layout, their totals, what a plan says of them; config.json that describes no draft."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv4q.checkpoint.folder import load_model_config
from dsv4q.checkpoint.native import release_tensors
from dsv4q.checkpoint.source import scan
from dsv4q.config import DraftChoice, load_config
from dsv4q.errors import SourceError
from dsv4q.layout import DTYPE_BYTES, RELEASES, Dims, draft_tensors, known_release, source_tensors
from dsv4q.plan.plan import Plan, make_plan
from dsv4q.plan.small_files import write_skeleton
from dsv4q.verify.judge import verify_headers
from runs import CONFIGS, FLASH

FOLDER = FLASH.parent.parent
SPARK = load_model_config(FOLDER / "deepseek-v4-flash-0731")
BY_NAME = {release.name.lower(): release for release in RELEASES}
Stored = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""
PUBLISHED = ("deepseek-v4-flash", "deepseek-v4-flash-0731", "deepseek-v4-pro-0813")


@cache
def planned(folder: str, **draft: Any) -> Plan:
    config = load_config(CONFIGS / "nvfp4-fp8-mtp.yaml")
    with scan(FOLDER / folder) as checkpoint:
        return make_plan(checkpoint, config.model_copy(update={"draft": DraftChoice(**draft)}))


# ------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_the_layout_has_the_totals_of_the_published_files(release: Any) -> None:
    stored = [t for spec in source_tensors(release.dims) for t in release_tensors(spec, release.expert_dtype)]
    sizes = [DTYPE_BYTES[dtype] * int.__mul__(*(*shape, 1, 1)[:2]) for _, dtype, shape in stored]
    assert (len(stored), sum(sizes)) == (release.tensors, release.nbytes)


@pytest.mark.parametrize("folder", PUBLISHED)
def test_a_published_config_json_is_known_by_its_numbers(folder: str) -> None:
    config = load_model_config(FOLDER / folder)
    assert known_release(Dims.from_config(config), config["expert_dtype"]) == BY_NAME[folder]


@pytest.mark.parametrize(
    ("folder", "model", "stages"),
    [
        ("deepseek-v4-flash", (35_020, 581_975_531_080), [797]),
        ("deepseek-v4-flash-0731", (36_599, 608_450_282_488), [791, 789, 796]),
        ("deepseek-v4-pro-0813", (75_511, 3_301_190_896_168), [1_175, 1_173, 1_180]),
    ],
)
def test_a_release_as_a_bf16_model_has_these_tensors_and_bytes(
    folder: str, model: tuple[int, int], stages: list[int]
) -> None:
    dims = BY_NAME[folder].dims
    specs = source_tensors(dims)
    assert (len(specs), sum(spec.nbytes for spec in specs)) == model
    assert [sum(1 for _ in draft_tensors(dims, stage)) for stage in range(dims.draft.stages)] == stages


def test_a_dspark_draft_has_these_tensors_beside_its_blocks() -> None:
    dims = Dims.from_config(SPARK)
    block = {spec.name.removeprefix("mtp.1.") for spec in draft_tensors(dims, 1)}
    rows = [
        (spec.name, spec.hf_name, spec.dtype, spec.shape)
        for stage in range(3)
        for spec in draft_tensors(dims, stage)
        if spec.name.removeprefix(f"mtp.{stage}.") not in block
    ]
    assert rows == [
        ("mtp.0.main_proj.weight", "mtp.0.main_proj.weight", "BF16", (4096, 12288)),
        ("mtp.0.main_norm.weight", "mtp.0.main_norm.weight", "BF16", (4096,)),
        ("mtp.2.norm.weight", "mtp.2.norm.weight", "BF16", (4096,)),
        ("mtp.2.hc_head_fn", "mtp.2.hc_head.hc_fn", "F32", (4, 16384)),
        ("mtp.2.hc_head_base", "mtp.2.hc_head.hc_base", "F32", (4,)),
        ("mtp.2.hc_head_scale", "mtp.2.hc_head.hc_scale", "F32", (1,)),
        ("mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w1.weight", "BF16", (129280, 256)),
        ("mtp.2.markov_head.markov_w2.weight", "mtp.2.markov_head.markov_w2.weight", "BF16", (129280, 256)),
        ("mtp.2.confidence_head.proj.weight", "mtp.2.confidence_head.proj.weight", "BF16", (1, 4352)),
    ]
    assert not [name for name in block if any(part in name for part in ("compressor", "indexer", "tid2eid"))]


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("folder", PUBLISHED)
def test_a_plan_of_a_published_config_json_says_the_release_and_its_files(folder: str) -> None:
    source = planned(folder).as_dict()["source"]
    release = BY_NAME[folder]
    assert (source["layout"], source["release"]["name"]) == ("assumed native", release.name)
    assert (source["tensors"], source["bytes"]) == (release.tensors, release.nbytes)


@pytest.mark.parametrize(
    ("folder", "draft", "artifact"),
    [
        ("deepseek-v4-flash-0731", {}, (142_798, 177_845_564_920, 9_288, 11_913_502_620)),
        ("deepseek-v4-flash-0731", {"linears": "fp8"}, (142_823, 177_398_980_600, 9_313, 11_466_918_300)),
        ("deepseek-v4-flash-0731", {"experts": "bf16"}, (135_886, 205_628_616_184, 2_376, 39_696_553_884)),
        ("deepseek-v4-pro-0813", {}, (297_000, 949_124_640_808, 13_896, 45_609_497_244)),
        ("deepseek-v4-pro-0813", {"linears": "fp8"}, (297_025, 947_872_946_728, 13_921, 44_357_803_164)),
        ("deepseek-v4-pro-0813", {"experts": "bf16"}, (286_632, 1_058_520_450_088, 3_528, 155_005_306_524)),
        ("deepseek-v4-flash", {"experts": "nvfp4", "shared_head_copies": False},
         (136_611, 169_892_847_688, 3_101, None)),
        ("deepseek-v4-flash", {}, (134_309, 181_271_426_888, 799, None)),
    ],
    ids=str,
)  # fmt: skip
def test_the_artifact_of_a_release_has_these_tensors_and_bytes(
    folder: str, draft: dict[str, Any], artifact: tuple[int, int, int, int | None]
) -> None:
    plan = planned(folder, **draft)
    facts = plan.as_dict()["artifact"]
    assert plan.problems == ()
    assert (facts["tensors"], facts["bytes"], facts["mtp_tensors"]) == artifact[:3]
    assert artifact[3] in (None, facts["mtp_bytes"])


@pytest.mark.parametrize("folder", PUBLISHED[1:])
def test_the_command_says_so_too(folder: str) -> None:
    arguments = ["plan", str(FOLDER / folder / "config.json"), "-c", str(CONFIGS / "nvfp4-fp8-mtp.yaml")]
    done = subprocess.run([sys.executable, "-m", "dsv4q", *arguments], capture_output=True, text=True, check=True)
    release = BY_NAME[folder]
    assert f"{release.name}, by config.json alone; {release.tensors:,} tensors" in " ".join(done.stdout.split())
    assert "a DSpark draft in the source" in done.stdout and "problems   none" in done.stdout


def write_hollow(root: Path, folder: str, gone: tuple[str, ...] = (), more: tuple[Stored, ...] = ()) -> Path:
    """A native checkpoint of full size, with the headers of a release and holes for data: a few megabytes on disk."""
    release = BY_NAME[folder]
    root.mkdir()
    (root / "config.json").write_bytes((FOLDER / folder / "config.json").read_bytes())
    of_release = [t for spec in source_tensors(release.dims) for t in release_tensors(spec, release.expert_dtype)]
    stored = [*(tensor for tensor in of_release if not tensor[0].startswith((*gone, "\0"))), *more]
    count = -(-len(stored) // 2000)
    weight_map, total = {}, 0
    for number in range(count):
        file, header, end = f"model-{number + 1:05d}-of-{count:05d}.safetensors", {}, 0
        for name, dtype, shape in stored[number * 2000 : number * 2000 + 2000]:
            begin, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
            header[name], weight_map[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}, file
        text = json.dumps(header).encode()
        (root / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(root / file, 8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def release_of(source: Path) -> tuple[int, dict[str, Any]]:
    """Exit code of `plan`, and what it says of the release that the source is."""
    arguments = ["plan", str(source), "-c", str(CONFIGS / "nvfp4-fp8-mtp.yaml"), "--json"]
    done = subprocess.run([sys.executable, "-m", "dsv4q", *arguments], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout)["source"]["release"]


@pytest.mark.parametrize("folder", PUBLISHED)
def test_a_plan_of_the_files_of_a_release_says_that_it_is_complete(folder: str, tmp_path: Path) -> None:
    _, found = release_of(write_hollow(tmp_path / "source", folder))
    release = BY_NAME[folder]
    assert found == {
        "name": release.name, "tensors": release.tensors, "bytes": release.nbytes, "complete": True,
        "missing": 0, "extra": 0, "missing_names": [], "extra_names": [],
    }  # fmt: skip


def test_a_plan_says_what_the_files_lack_of_the_release(tmp_path: Path) -> None:
    gone = ("mtp.1.", "mtp.2.confidence_head")
    code, found = release_of(write_hollow(tmp_path / "source", "deepseek-v4-flash-0731", gone=gone))
    assert (code, found["complete"], found["missing"], found["extra"]) == (1, False, 1_565 + 1, 0)
    assert found["missing_names"][0] == "mtp.1.attn.attn_sink"


def test_a_plan_says_what_the_files_have_beyond_the_release(tmp_path: Path) -> None:
    more = (("mtp.1.norm.weight", "BF16", (4096,)),)
    code, found = release_of(write_hollow(tmp_path / "source", "deepseek-v4-flash-0731", more=more))
    assert (code, found["complete"], found["missing"], found["extra"]) == (1, False, 0, 1)
    assert found["extra_names"] == ["mtp.1.norm.weight"]


def ignored(number: int, of_draft: str, of_stage: str) -> list[str]:
    stages = [rf"re:^model\.layers\.{number + stage}\.{of_stage}" for stage in range(3)]
    return ["lm_head", rf"re:^mtp\.{of_draft}", *stages]


@pytest.mark.parametrize(
    ("draft", "ignore"),
    [
        ({}, ignored(43, r"\d+\.attn\..*", r"attn\..*")),
        ({"experts": "bf16"}, ignored(43, ".*", ".*")),
        ({"linears": "fp8"}, ["lm_head"]),
    ],
    ids=str,
)
def test_a_form_of_a_dspark_draft_has_this_ignore_list(draft: dict[str, Any], ignore: list[str]) -> None:
    plan = planned("deepseek-v4-flash-0731", **draft)
    assert plan.artifact_config["quantization_config"]["ignore"] == ignore
    if "linears" not in draft:
        of_mtp = planned("deepseek-v4-flash").artifact_config["quantization_config"]["config_groups"]
        assert plan.artifact_config["quantization_config"]["config_groups"] == of_mtp


def test_fp8_linears_of_a_dspark_draft_add_the_names_that_the_consumer_fuses() -> None:
    groups = planned("deepseek-v4-flash-0731", linears="fp8").artifact_config["quantization_config"]["config_groups"]
    fused = r"(attn\.fused_wqa_wkv|ffn\.shared_experts\.(gate_up_proj|down_proj))$"
    assert groups["group_0"]["targets"][1:] == [
        r"re:^mtp\.\d+\.(ffn\.shared_experts\.(w1|w2|w3)|main_proj)$",
        r"re:^model\.(main_proj|context_wkv_proj)$",
        *[rf"re:^model\.layers\.{number}\.{fused}" for number in (43, 44, 45)],
    ]


def test_mtp_with_nvfp4_experts_ignores_all_of_the_draft_but_these() -> None:
    ignore = planned("deepseek-v4-flash", experts="nvfp4").artifact_config["quantization_config"]["ignore"]
    assert ignore == [
        "lm_head", r"re:^mtp\.\d+\.(?!ffn\.experts).*", r"re:^model\.mtp\.\d+\.(?!ffn\.experts).*",
        r"re:^model\.layers\.43\.(?!ffn\.experts).*",
    ]  # fmt: skip


def test_config_json_keeps_every_key_of_a_dspark_source() -> None:
    made = planned("deepseek-v4-flash-0731").artifact_config
    assert {k: v for k, v in made.items() if k != "quantization_config"} == {
        k: v for k, v in SPARK.items() if k != "quantization_config"
    }


def test_without_its_draft_a_dspark_source_leaves_no_word_of_it() -> None:
    plan = planned("deepseek-v4-flash-0731", keep=False)
    made = plan.artifact_config
    assert plan.problems == () and not [t.name for t in plan.tensors if t.name.startswith("mtp.")]
    assert made["num_nextn_predict_layers"] == 0 and not [key for key in made if key.startswith("dspark")]
    assert Dims.from_config(made).draft.stages == 0


@pytest.mark.parametrize("folder", PUBLISHED[1:])
def test_the_full_size_skeleton_of_a_dspark_release_is_as_the_judge_wants_it(folder: str, tmp_path: Path) -> None:
    plan = planned(folder)
    write_skeleton(tmp_path / "out", FOLDER / folder, plan)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (len(index["weight_map"]), index["metadata"]["total_size"]) == (len(plan.tensors), plan.artifact_bytes)
    assert verify_headers(tmp_path / "out").differences == ()


# ------------------------------------------------------------------------------------------------ choices


@pytest.mark.parametrize(
    ("folder", "draft", "where", "words"),
    [
        ("deepseek-v4-flash-0731", {"shared_head_copies": True}, "draft.shared_head_copies", "With DSpark"),
        ("deepseek-v4-flash-0731", {"experts": "bf16", "linears": "fp8"}, "draft.linears", "one form only"),
        ("deepseek-v4-flash", {"experts": "nvfp4", "linears": "fp8"}, "draft.linears", "one form only"),
    ],
)
def test_a_form_that_the_consumer_cannot_load_is_a_problem(
    folder: str, draft: dict[str, Any], where: str, words: str
) -> None:
    (problem,) = planned(folder, **draft).problems
    assert problem.where == where and words in str(problem)


def test_a_recipe_without_nvfp4_leaves_a_dspark_draft_as_it_is_unless_told_otherwise() -> None:
    config = load_config(CONFIGS / "w4a16-fp8-mtp.yaml")
    with scan(FOLDER / "deepseek-v4-flash-0731") as checkpoint:
        plan = make_plan(checkpoint, config)
        told = make_plan(checkpoint, config.model_copy(update={"draft": DraftChoice(experts="nvfp4")}))
    assert (plan.problems, plan.draft_form.experts) == ((), "bf16")
    (problem,) = told.problems
    assert problem.where == "draft.experts" and "no scheme that the draft could take" in str(problem)


# ------------------------------------------------------------------------------------------------ bad config.json


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.pop(key)


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(values)


RATIOS = SPARK["compress_ratios"]
KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
BAD: Mapping[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    **{f"without {key}": (without(key), key, "describes a DSpark draft") for key in KEYS},
    "two targets": (changed(dspark_target_layer_ids=[40, 41]), KEYS[2], "3 main layers, one for each stage"),
    "four targets": (changed(dspark_target_layer_ids=[39, 40, 41, 42]), KEYS[2], "3 main layers, one for each stage"),
    "a target that is no layer": (changed(dspark_target_layer_ids=[41, 42, 43]), KEYS[2], "main layers, 0 to 42"),
    "targets that are no list": (changed(dspark_target_layer_ids=3), KEYS[2], "main layers, 0 to 42"),
    "no stage": (changed(compress_ratios=RATIOS[:43]), "compress_ratios", "a 0 for each stage"),
    "two stages": (changed(compress_ratios=RATIOS[:45]), KEYS[2], "2 main layers, one for each stage"),
    "two stages and two targets": (
        changed(compress_ratios=RATIOS[:45], dspark_target_layer_ids=[41, 42]), "compress_ratios", "3 stages: so many"
    ),
    "four stages and four targets": (
        changed(compress_ratios=[*RATIOS, 0], dspark_target_layer_ids=[39, 40, 41, 42]), "compress_ratios", "3 stages"
    ),
    "a stage of another kind": (changed(compress_ratios=[*RATIOS[:45], 4]), "compress_ratios", "a 0 for each stage"),
    "n_mtp_layers of another number": (changed(n_mtp_layers=2), "compress_ratios", "2 stages: so many"),
    "a rank of 0": (changed(dspark_markov_rank=0), "dspark_markov_rank", "an integer from 1"),
    "a noise token outside of the vocabulary": (changed(dspark_noise_token_id=129280), KEYS[1], "0 to 129,279"),
    "the keys of MTP": (
        lambda config: [config.pop(key) for key in KEYS], "compress_ratios", "44 entries: 43 main layers, 1 of num_"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_config_json_that_describes_no_draft_is_refused_by_key(case: str) -> None:
    change, key, words = BAD[case]
    config = dict(SPARK)
    change(config)
    with pytest.raises(SourceError) as caught:
        Dims.from_config(config)
    assert caught.value.where == f"config.json: {key}" and words in caught.value.text()


def test_num_nextn_predict_layers_says_nothing_of_stages() -> None:
    for value in (0, 1, 3, None):
        config = {k: v for k, v in SPARK.items() if k != "num_nextn_predict_layers"}
        config |= {} if value is None else {"num_nextn_predict_layers": value}
        assert Dims.from_config(config).draft.stages == 3


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        ({"model_type": "deepseek_v41"}, "DeepSeek-V4.1", "n-gram tables"),
        ({**SPARK, "architectures": ["DeepseekV41ForCausalLM"]}, "DeepSeek-V4.1", "another architecture"),
        ({**SPARK, "engram_layer_ids": [1, 2]}, "DeepSeek-V4.1", "another architecture"),
        ({**SPARK, "vision_config": {}}, "DeepSeek-V4-Flash-Vision-Exp", "vision encoder"),
        ({**SPARK, "architectures": ["DeepseekV4ForConditionalGeneration"]}, "Vision-Exp", "vision encoder"),
        ({"model_type": "deepseek_v4_vl"}, "Vision-Exp", "vision encoder"),
    ],
)
def test_relatives_of_another_architecture_are_refused_by_name_with_the_reason(
    config: dict[str, Any], name: str, reason: str
) -> None:
    with pytest.raises(SourceError) as caught:
        Dims.from_config(config)
    assert name in caught.value.what and reason in caught.value.what
