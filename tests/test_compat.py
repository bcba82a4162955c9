"""`dsv4q compat`: which engine loads what, by rules of one file; plan, model cards and README say the same."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from artifact_maker import edit, edit_config, edit_json
from dsv4q.__main__ import main
from dsv4q.config import Output, load_config
from dsv4q.engines.compat import FAILS, LOADS, UNKNOWN, WORDS, WRONG, rows_of, serving, table
from dsv4q.engines.facts import Facts, read_facts
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import RANDOM, ToyConfig, with_draft, write_toy
from dsv4q.plan.plan import make_plan
from dsv4q.plan.small_files import write_skeleton
from dsv4q.checkpoint.source import scan
from export_toys import TINY, native_toy, quantized, to_modelopt
from runs import CONFIGS

README = Path(__file__).parent.parent / "README.md"
LAYERED = replace(TINY, compress_ratios=(0, 4, 128))
Words = dict[str, str]


def skeleton(folder: Path, config: str = "nvfp4-fp8-mtp", draft: str = "mtp", **form: Any) -> Path:
    """The artifact that a config would make of a toy, as sparse files: names and headers are all that counts here."""
    source = folder / "source.json"
    source.write_text(json.dumps(with_draft(LAYERED, draft).as_config_json()))
    parsed = load_config(CONFIGS / f"{config}.yaml").model_copy(update={"output": Output(shards=2)})
    parsed = parsed.model_copy(update={"draft": parsed.draft.model_copy(update=form)})
    with scan(source) as checkpoint:
        plan = make_plan(checkpoint, parsed)
    assert not plan.problems
    write_skeleton(folder / "artifact", source, plan)
    return folder / "artifact"


def words(path: Path) -> Words:
    return {row.name.split(" (")[0].removesuffix(" main of 2026"): row.word for row in rows_of(read_facts(path))}


def verdicts(path: Path) -> dict[str, tuple[str, str | None]]:
    return {row.name: (row.model.loads, row.draft and row.draft.loads) for row in rows_of(read_facts(path))}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_toy(tmp_path_factory.mktemp("source") / "native")


@pytest.fixture(scope="module")
def modelopt(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modelopt")
    return to_modelopt(quantized(native, root / "artifact"), native, root / "out")


# ------------------------------------------------------------------------------------------------ facts


@pytest.mark.parametrize(
    ("config", "draft", "form", "facts"),
    [
        ("nvfp4-fp8-mtp", "mtp", {}, ("nvfp4", "fp8", "mtp", "bf16", True)),
        ("nvfp4-fp8-mtp", "mtp", {"shared_head_copies": False}, ("nvfp4", "fp8", "mtp", "bf16", False)),
        ("nvfp4-fp8-mtp-nvfp4", "mtp", {}, ("nvfp4", "fp8", "mtp", "nvfp4", False)),
        ("nvfp4-fp8-mtp", "dspark", {}, ("nvfp4", "fp8", "dspark", "nvfp4", False)),
        ("nvfp4-fp8-mtp", "dspark", {"linears": "fp8"}, ("nvfp4", "fp8", "dspark", "nvfp4", False)),
        ("nvfp4-fp8-mtp", "dspark", {"experts": "bf16"}, ("nvfp4", "fp8", "dspark", "bf16", False)),
        ("nvfp4-fp8", "mtp", {}, ("nvfp4", "fp8", "none", "none", False)),
        ("w4a16-fp8-mtp", "mtp", {}, ("int", "fp8", "mtp", "bf16", True)),
    ],
)
def test_an_artifact_of_ours_is_known_by_its_headers(
    tmp_path: Path, config: str, draft: str, form: dict[str, Any], facts: tuple[object, ...]
) -> None:
    found = read_facts(skeleton(tmp_path, config, draft, **form))
    assert (found.experts, found.attention, found.draft, found.draft_experts, found.head_copies) == facts
    assert found.layout == found.quant_method == "compressed-tensors"


def test_an_export_is_known_by_its_headers(modelopt: Path) -> None:
    facts = read_facts(modelopt)
    assert (facts.layout, facts.experts, facts.attention, facts.draft_experts) == ("modelopt", "nvfp4", "fp8", "mxfp4")
    assert facts.draft_ignored and (facts.quant_algo, facts.moe_quant_algo) == ("mixed_precision", "nvfp4")


@pytest.mark.parametrize(
    ("form", "layout", "experts"),
    [(RANDOM, "bf16", "bf16"), (native_form(), "native", "mxfp4"), (native_form("fp8"), "native", "fp8")],
)
def test_a_source_is_known_by_its_headers(tmp_path: Path, form: Any, layout: str, experts: str) -> None:
    facts = read_facts(write_toy(tmp_path / "toy", TINY, form=form).out)
    assert (facts.layout, facts.experts, facts.draft_experts) == (layout, experts, experts)


# ------------------------------------------------------------------------------------------------ verdicts


def test_our_layout_is_for_vllm_0_33_and_for_no_other(tmp_path: Path) -> None:
    assert words(skeleton(tmp_path)) == {
        "vLLM 0.33.0": "yes", "vLLM 0.26.0": "no", "SGLang 0.5.23": "no: wrong in silence", "TensorRT-LLM": "no",
    }  # fmt: skip


def test_modelopt_s_layout_is_for_each_engine_but_not_for_each_draft(modelopt: Path) -> None:
    assert words(modelopt) == {
        "vLLM 0.33.0": "yes", "vLLM 0.26.0": "yes, its draft not", "SGLang 0.5.23": "yes",
        "TensorRT-LLM": "yes, its draft is not known",
    }  # fmt: skip


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
@pytest.mark.parametrize("experts", ["bf16", "nvfp4"])
def test_vllm_loads_every_form_of_the_draft_that_quantize_writes(tmp_path: Path, draft: str, experts: str) -> None:
    form = {"experts": experts} | ({"shared_head_copies": False} if draft == "mtp" else {})
    assert verdicts(skeleton(tmp_path, draft=draft, **form))["vLLM 0.33.0"] == (LOADS, LOADS)


def test_copies_of_the_shared_head_with_dspark_are_fatal(tmp_path: Path) -> None:
    folder = skeleton(tmp_path, draft="dspark")
    edit(folder, {"mtp.0.head.weight": torch.zeros(300, 128, dtype=torch.bfloat16)})
    assert verdicts(folder)["vLLM 0.33.0"] == (LOADS, FAILS)


def test_an_ignore_list_without_the_draft_makes_it_garbage_in_vllm_alone(
    modelopt: Path, tmp_path: Path, copied: Any = None
) -> None:
    import shutil

    folder = tmp_path / "artifact"
    shutil.copytree(modelopt, folder)
    edit_config(folder, lambda quantization: quantization["ignore"].remove("mtp.*"))
    found = verdicts(folder)
    assert found["vLLM 0.33.0"] == (LOADS, WRONG) and found["SGLang 0.5.23"] == (LOADS, LOADS)


def test_without_moe_quant_algo_no_engine_reads_the_experts(modelopt: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "artifact"
    shutil.copytree(modelopt, folder)
    edit_config(folder, lambda quantization: quantization.pop("moe_quant_algo"))
    found = verdicts(folder)
    assert found["vLLM 0.33.0"][0] == FAILS and found["SGLang 0.5.23"][0] == UNKNOWN


def test_a_form_without_a_rule_is_not_called_good(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", TINY).out
    name = "layers.0.ffn.experts.0.w1.weight"
    edit(folder, {name: torch.zeros(64, 128, dtype=torch.float16)})
    edit_json(folder, "config.json", lambda config: config.update(quantization_config={"quant_method": "compressed-tensors"}))
    assert verdicts(folder)["vLLM 0.33.0"] == (UNKNOWN, None)
