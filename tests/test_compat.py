"""`dsv4q compat`: which engine loads what, by rules of one file; plan, model cards and README say the same."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import dsv4q
from artifact_maker import copy, edit, edit_config, edit_json
from dsv4q.__main__ import main
from dsv4q.checkpoint.native import scan_source
from dsv4q.checkpoint.source import scan
from dsv4q.config import Activations, Output, load_config
from dsv4q.console import Console, Mode
from dsv4q.engines.compat import (
    FAILS,
    LOADS,
    UNKNOWN,
    WORDS,
    WRONG,
    hardware_of,
    rows_of,
    serving,
    servings,
    table,
    widths_without_kernels,
)  # fmt: skip
from dsv4q.engines.facts import Facts, read_facts
from dsv4q.export.plan import plan_export
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import FOR_VLLM, RANDOM, with_draft, write_toy
from dsv4q.plan.modelcard import plan_facts
from dsv4q.plan.plan import make_plan
from dsv4q.plan.small_files import write_skeleton
from dsv4q.quantize import Job, quantize
from export_toys import TINY, native_toy, quantized, to_modelopt
from runs import CONFIGS

README = Path(__file__).parent.parent / "README.md"
RELEASES = sorted((Path(dsv4q.__file__).parent / "releases").glob("*/config.json"))
SERVED = replace(TINY, **FOR_VLLM)
LAYERED = replace(SERVED, compress_ratios=(0, 4, 128))
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
    return {row.name.removesuffix(" main at 02586bf"): row.word for row in rows_of(read_facts(path))}


def verdicts(path: Path) -> dict[str, tuple[str, str | None]]:
    return {row.name: (row.model.loads, row.draft and row.draft.loads) for row in rows_of(read_facts(path))}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_toy(tmp_path_factory.mktemp("source") / "native", SERVED)


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
        "vLLM 0.33.0": "yes", "vLLM 0.26.0": "no", "SGLang 0.5.23": "no: wrong, without an error", "TensorRT-LLM": "no",
    }  # fmt: skip


def test_modelopt_s_layout_is_for_more_engines_but_not_for_each_draft(modelopt: Path) -> None:
    assert words(modelopt) == {
        "vLLM 0.33.0": "yes", "vLLM 0.26.0": "yes, its draft not", "SGLang 0.5.23": "yes",
        "TensorRT-LLM": "not known",
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


def test_an_ignore_list_without_the_draft_makes_it_garbage_in_vllm_alone(modelopt: Path, tmp_path: Path) -> None:
    folder = copy(modelopt, tmp_path / "artifact")
    edit_config(folder, lambda quantization: quantization["ignore"].remove("mtp.*"))
    found = verdicts(folder)
    assert found["vLLM 0.33.0"] == (LOADS, WRONG) and found["SGLang 0.5.23"] == (LOADS, LOADS)


def test_without_moe_quant_algo_no_engine_reads_the_experts(modelopt: Path, tmp_path: Path) -> None:
    folder = copy(modelopt, tmp_path / "artifact")
    edit_config(folder, lambda quantization: quantization.pop("moe_quant_algo"))
    found = verdicts(folder)
    assert found["vLLM 0.33.0"][0] == FAILS and found["SGLang 0.5.23"][0] == UNKNOWN


def test_the_limit_of_ranks_is_told_where_linears_of_the_draft_are_fp8(tmp_path: Path) -> None:
    told = []
    for name, form in (("plain", {}), ("fp8", {"linears": "fp8"})):
        (tmp_path / name).mkdir()
        row = rows_of(read_facts(skeleton(tmp_path / name, draft="dspark", **form)))[0]
        told.append("multiple of 128" in row.reasons)
    assert told == [False, True]


def test_a_form_without_a_rule_is_not_called_good(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", TINY).out
    name = "layers.0.ffn.experts.0.w1.weight"
    edit(folder, {name: torch.zeros(64, 128, dtype=torch.float16)})
    stated = {"quant_method": "compressed-tensors"}
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=stated))
    assert verdicts(folder)["vLLM 0.33.0"] == (UNKNOWN, None)


def test_a_model_for_whose_widths_vllm_has_no_kernels_is_not_called_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = write_toy(tmp_path / "toy", TINY, form=native_form()).out
    assert words(toy)["vLLM 0.33.0"] == "not at these widths" and words(toy)["SGLang 0.5.23"] == "yes"
    assert call("compat", toy) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vLLM 0.33.0, widths: no: ")]
    assert len(told) == 1 and "head_dim 64 (it takes 512)" in told[0]


@pytest.mark.parametrize("config", RELEASES)
def test_the_releases_have_widths_for_which_there_are_kernels(config: Path) -> None:
    parsed = json.loads(config.read_text())
    assert [widths_without_kernels(engine, parsed) for engine in table()["engines"]] == [[]] * 4


@pytest.mark.parametrize("config", ["nvfp4-fp8-mtp", "w4a16-fp8-mtp"])
@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_the_plan_of_an_artifact_has_the_verdicts_of_the_artifact(tmp_path: Path, config: str, draft: str) -> None:
    form = {} if config == "nvfp4-fp8-mtp" or draft == "mtp" else {"experts": "bf16"}
    made = skeleton(tmp_path, config, draft, **form)
    parsed = load_config(CONFIGS / f"{config}.yaml").model_copy(update={"output": Output(shards=2)})
    parsed = parsed.model_copy(update={"draft": parsed.draft.model_copy(update=form)})
    with scan(tmp_path / "source.json") as checkpoint:
        assert plan_facts(make_plan(checkpoint, parsed)) == read_facts(made)


# ------------------------------------------------------------------------------------------------ the data file


RULES = [rule for engine in table()["engines"] for part in ("model", "draft") for rule in engine[part]]


@pytest.mark.parametrize("rule", [*RULES, *table()["hardware"]], ids=str)
def test_a_rule_asks_for_facts_that_there_are_in_words_that_they_have(rule: dict[str, Any]) -> None:
    types = get_type_hints(Facts)
    known = {"layout": {"compressed-tensors", "modelopt", "native", "bf16"}, "draft": {"mtp", "dspark"}}
    forms = {"nvfp4", "nvfp4-weight-only", "int", "mxfp4", "fp8", "bf16"}
    known |= dict.fromkeys(("experts", "attention", "draft_experts", "draft_linears"), forms)
    for key, wanted in rule["when"].items():
        for word in wanted if isinstance(wanted, list) else [wanted]:
            assert type(word) is types[key] and word in known.get(key, {word})


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_says_why_and_what_stands_behind_it(rule: dict[str, Any]) -> None:
    assert rule.keys() == {"when", "loads", "why", "known", "source"}
    assert rule["loads"] in WORDS and rule["known"] in ("run", "read") and rule["why"] and rule["source"]


def test_hardware_and_command_lines_are_of_engines_in_the_table() -> None:
    known = {(engine["name"], engine["version"]) for engine in table()["engines"]}
    rows = [row for entry in table()["hardware"] for row in entry["engines"]] + table()["serve"]
    for row in rows:
        assert (row["name"], row["version"]) in known and row["known"] in ("run", "read") and row["source"]
        assert row.get("when", {}).keys() <= get_type_hints(Facts).keys()


def test_a_line_says_whether_a_server_was_started_with_it() -> None:
    assert serving("vLLM", "mtp", 2, 1).evidence.startswith("run: ")
    for engine, draft in (("vLLM", "dspark"), ("vLLM", "none"), ("SGLang", "mtp")):
        assert serving(engine, draft, 2, 1).evidence.endswith("it was not run")


def test_a_line_that_was_run_is_of_a_kind_of_draft_that_has_one() -> None:
    for entry in table()["serve"]:
        assert entry.get("run", {}).keys() <= entry["draft"].keys()


def test_no_rule_is_hidden_by_one_before_it() -> None:
    def words_of(value: object) -> set[object]:
        return set(value) if isinstance(value, list) else {value}

    for engine in table()["engines"]:
        for part in ("model", "draft"):
            seen: list[dict[str, Any]] = []
            for rule in engine[part]:
                when = rule["when"]
                for before in seen:
                    hides = all(key in when and words_of(when[key]) <= words_of(v) for key, v in before.items())
                    assert not hides, f"{engine['name']} {engine['version']}: {before} comes before {when}"
                seen.append(when)


def test_the_package_has_the_data_file() -> None:
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())
    assert "engines/compat.yaml" in project["tool"]["setuptools"]["package-data"]["dsv4q"]


# ------------------------------------------------------------------------------------------------ the command


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_the_command_prints_a_row_for_each_engine(modelopt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compat", modelopt) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in rows_of(read_facts(modelopt)):
        assert any(line.split() == f"{row.name} {row.word}".split() for line in lines)
        for part, verdict in (("model", row.model), ("draft", row.draft)):
            told = [one for one in lines if one.startswith(f"{row.name}, {part}: ")]
            assert len(told) == (verdict is not None)
            assert verdict is None or (verdict.why in told[0] and verdict.source in told[0])
    for one in hardware_of(read_facts(modelopt), rows_of(read_facts(modelopt))).rows:
        assert any(
            line.startswith(f"{one['name']} {one['version']}, SM {one['sm']}: {one['experts']}") for line in lines
        )


def test_the_command_s_json_has_facts_verdicts_hardware_and_command_lines(
    modelopt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compat", modelopt, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["layout"] == "modelopt"
    assert [row["engine"] for row in found["engines"]] == ["vLLM", "vLLM", "SGLang", "TensorRT-LLM"]
    assert all(row["model"]["known"] in ("run", "read") and row["model"]["source"] for row in found["engines"])
    assert {row["sm"] for row in found["hardware"]["engines"] if row["name"] == "vLLM"} == {"9.0", "10.x", "12.x"}
    assert [one["engine"] for one in found["serve"]] == ["vLLM", "SGLang"]


def test_the_exit_code_is_1_if_no_engine_is_known_to_load_it(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", TINY).out
    edit(folder, {"layers.0.ffn.experts.0.w1.weight": torch.zeros(64, 128, dtype=torch.float16)})
    stated = {"quant_method": "compressed-tensors"}
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=stated))
    assert call("compat", folder, "--quiet") == 1


BAD: dict[str, tuple[Any, str]] = {
    "no such folder": (lambda f: f.rename(f.parent / "gone"), "config.json"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "another model": (lambda f: edit_json(f, "config.json", lambda c: c.update(model_type="llama")), "model_type"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")], "no safetensors"),
    "a shard missing": (lambda f: next(f.glob("*.safetensors")).unlink(), "not there"),
    "a run that has not finished": (lambda f: (f / ".dsv4q").mkdir(), "not finished"),
    "another tool's layout": (
        lambda f: edit_json(f, "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})), "gptq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_what_is_no_artifact_is_refused_by_name(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "toy", TINY).out
    spoil, told = BAD[wrong]
    spoil(folder)
    assert call("compat", folder) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error") and told in err and "Traceback" not in err


def test_a_plan_has_a_line_about_the_engines_of_what_it_writes(
    native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for layout in ("compressed-tensors", "modelopt"):
        assert call("plan", native, "--config", "toy", "--layout", layout) == 0
        (found[layout],) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("engines ")]
    assert "SGLang 0.5.23: no" in found["compressed-tensors"] and "SGLang 0.5.23: yes" in found["modelopt"]
    assert all("vLLM 0.33.0: yes" in line for line in found.values())


# ------------------------------------------------------------------------------------------------ cards, README


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_model_card_has_each_verdict_and_each_command_line(tmp_path: Path, modelopt: Path, layout: str) -> None:
    folder = modelopt if layout == "modelopt" else skeleton(tmp_path)
    facts, card = read_facts(folder), (folder / "README.md").read_text()
    rows = rows_of(facts)
    for row in rows:
        assert f"| {row.name} | {row.word} | {row.reasons} | {row.evidence} |" in card
    for one in servings(facts, rows):
        assert one.command in card and f"{one.name} ({one.evidence})" in card
    assert ("sglang" in card) == (layout == "modelopt")
    for one in hardware_of(facts, rows).rows:
        assert f"| SM {one['sm']} | {one['name']} {one['version']} | {one['experts']} |" in card


def test_a_card_explains_bounds_for_what_they_are(tmp_path: Path, native: Path) -> None:
    observed = quantized(native, tmp_path / "observed")
    config = load_config(CONFIGS / "toy.yaml")
    config = config.model_copy(update={"activations": Activations(scales="bound"), "calibration": None})
    quantize(Job(native, tmp_path / "bound", config, device="cpu"), Console(Mode.QUIET))
    for name, told in (("observed", "calibration saw"), ("bound", "no input is ever\nclipped")):
        made = to_modelopt(tmp_path / name, native, tmp_path / f"{name}-modelopt")
        for folder in (tmp_path / name, made):
            card = (folder / "README.md").read_text()
            assert told in card and "## Input scales" in card
    assert "bound" not in (observed / "README.md").read_text()


def readme_table() -> dict[str, list[str]]:
    """Engine -> its cells in README's table of files and engines."""
    lines = README.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| engine |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin + 2 :]]
    return {row[0]: row[1:] for row in rows[: rows.index([""])]}


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_the_readme_s_table_says_what_the_data_say(tmp_path: Path, native: Path, draft: str) -> None:
    toy = with_draft(LAYERED, draft)
    source = native_toy(tmp_path / "native", toy)
    plain = write_toy(tmp_path / "plain", toy).out
    with scan_source(source) as checkpoint:
        config = load_config(CONFIGS / "toy.yaml")
        plan = make_plan(checkpoint, config)
        facts = [plan_facts(plan), plan_export(checkpoint, plan).facts, read_facts(source), read_facts(plain)]
    found = readme_table()
    rows = [rows_of(one) for one in facts]
    assert [row.name for row in rows[0]] == list(found)
    for number, cells in enumerate(found.values()):
        told = [cell.split("; DSpark: ")[-1 if draft == "dspark" else 0] for cell in cells]
        assert told == [some[number].word for some in rows]


_GPUS = re.compile(r"\b(9\.0|1[02]\.x) \(([^)]*)\)")


@pytest.mark.parametrize("document", ["README.md", "docs/evaluation.md"])
def test_the_command_lines_in_documents_are_those_of_the_data(document: str) -> None:
    text = (README.parent / document).read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("vllm serve")]
    told = line.split()
    wanted = serving("vLLM", "mtp", 2, 4).command.replace("\\\n", " ").split()
    assert told[: len(wanted)] == wanted


@pytest.mark.parametrize("path", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_documents_name_no_gpu_beside_an_sm_but_those_of_the_data(path: Path) -> None:
    known = {(sm, cards) for entry in table()["hardware"] for sm, cards in _GPUS.findall(entry["text"])}
    assert set(_GPUS.findall(path.read_text())) <= known
