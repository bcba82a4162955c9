"""Defects planted in drafts of every form: the real command names each, also what vLLM takes in silence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifact_maker import Tensors, edit, edit_config, edit_json, read
from dsv4q.__main__ import main
from dsv4q.config import DraftChoice, load_config
from dsv4q.layout import Dims
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, with_draft, write_toy
from dsv4q.quantize import Job
from runs import CONFIGS, run

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mtp bf16": ("mtp", {}),
    "mtp nvfp4": ("mtp", {"experts": "nvfp4", "shared_head_copies": False}),
    "dspark nvfp4": ("dspark", {}),
    "dspark nvfp4-fp8": ("dspark", {"linears": "fp8"}),
    "dspark bf16": ("dspark", {"experts": "bf16"}),
}
LAYERS = Dims.from_config(ToyConfig().as_config_json()).layers
STAGES = {"mtp": 1, "dspark": 3}
SPARKS = [form for form in FORMS if form.startswith("dspark")]
NVFP4 = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
HEAD = ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")
SPARK_HEAD = (*HEAD, "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight")
OUTSIDE: dict[str, tuple[str, ...]] = {
    "mtp": tuple(f"mtp.0.{name}" for name in (*HEAD, "enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight")),
    "dspark": (
        "mtp.0.main_proj.weight", "mtp.0.main_norm.weight", *(f"mtp.2.{name}" for name in SPARK_HEAD)
    ),
}  # fmt: skip
"""Tensors of a draft that are in one of its stages alone, or would be."""


def kind_of(form: str) -> str:
    return FORMS[form][0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished artifact of each form, by its name."""
    folder = tmp_path_factory.mktemp("forms")
    toy = load_config(CONFIGS / "toy.yaml")
    for kind in STAGES:
        write_toy(folder / kind, with_draft(ToyConfig(), kind), form=native_form())
    for form, (kind, choice) in FORMS.items():
        config = toy.model_copy(update={"draft": DraftChoice(**choice)})
        run(Job(folder / kind, folder / form, config, device="cpu"))
    return {form: folder / form for form in FORMS}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def artifact(form: str, finished: dict[str, Path], tmp_path: Path) -> Path:
    """One of one's own to spoil."""
    return Path(shutil.copytree(finished[form], tmp_path / "artifact"))


def differences(capsys: pytest.CaptureFixture[str], artifact: Path, *options: str) -> list[dict[str, Any]]:
    """What `verify-shards` finds; it exits with 3 exactly if there is something."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--json", *options])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["differences"]
    assert stopped.value.code == (3 if found else 0)
    return found


def found_in(differences: list[dict[str, Any]]) -> set[tuple[str, str | None]]:
    return {(one["check"], one["tensor"]) for one in differences}


def of_stage(tensors: Tensors, stage: int) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"mtp.{stage}.")}


def ignore_of(artifact: Path) -> list[str]:
    entries: list[str] = json.loads((artifact / "config.json").read_text())["quantization_config"]["ignore"]
    return entries


def test_nothing_is_found_in_a_whole_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert differences(capsys, artifact, "--deep") == []


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize(("form", "stage"), [(form, s) for form in FORMS for s in range(STAGES[kind_of(form)])])
def test_every_tensor_of_a_missing_stage_is_named(
    stage: int, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = of_stage(read(artifact), stage)
    edit(artifact, dict.fromkeys(gone))
    # Of copies of the shared head all or none are there.
    expected = {("mtp", name) for name in gone if not name.endswith(("emb.tok_emb.weight", "0.head.weight"))}
    assert found_in(differences(capsys, artifact)) == expected


def test_a_stage_too_many_is_named(form: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = STAGES[kind_of(form)]
    last = of_stage(read(artifact), count - 1)
    more = {name.replace(f"mtp.{count - 1}.", f"mtp.{count}."): tensor for name, tensor in last.items()}
    edit(artifact, more)
    assert found_in(differences(capsys, artifact)) == {("mtp", name) for name in more}


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in FORMS for name in OUTSIDE[kind_of(form)]])
def test_a_missing_tensor_of_the_drafts_ends_is_named(
    name: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(artifact, {name: None})
    (one,) = differences(capsys, artifact)
    assert (one["check"], one["tensor"], one["found"]) == ("mtp", name, "no such tensor")


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in FORMS for name in OUTSIDE[kind_of(form)]])
def test_a_tensor_of_the_drafts_ends_in_a_second_stage_is_named(
    form: str, name: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # vLLM takes the one that it reads last.
    stages = {int(name[4])} ^ {*range(STAGES[kind_of(form)])} or {1}
    doubled = {re.sub(r"^mtp\.\d", f"mtp.{stage}", name): read(artifact)[name] for stage in stages}
    edit(artifact, doubled)
    assert found_in(differences(capsys, artifact)) == {("mtp", other) for other in doubled}


def test_a_tensor_of_the_draft_in_two_shards_is_named(
    form: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = OUTSIDE[kind_of(form)][-1]
    first = min(artifact.glob("*.safetensors"))
    save_file({**load_file(first), name: read(artifact)[name]}, first)
    assert name in {one["tensor"] for one in differences(capsys, artifact)}


SCALES = [
    *((form, f"mtp.0.ffn.experts.3.w2.{suffix}") for form in FORMS if form not in ("mtp bf16", "dspark bf16")
      for suffix in NVFP4),
    *((form, f"mtp.2.ffn.experts.0.w1.{suffix}") for form in ("dspark nvfp4", "dspark nvfp4-fp8") for suffix in NVFP4),
    *(("dspark nvfp4-fp8", f"mtp.{module}.weight_scale")
      for module in ("0.main_proj", "0.attn.wq_a", "1.attn.wkv", "2.attn.wo_b", "1.ffn.shared_experts.w3")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "name"), SCALES)
def test_a_missing_tensor_of_a_quantized_linear_of_the_draft_is_named(
    name: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(artifact, {name: None})
    assert found_in(differences(capsys, artifact)) == {("mtp", name)}


@pytest.mark.parametrize("module", ["mtp.0.main_proj", "mtp.1.attn.wq_b", "mtp.2.ffn.shared_experts.w2"])
@pytest.mark.parametrize("form", ["dspark nvfp4-fp8"])
def test_bf16_where_the_lists_build_fp8_is_named(
    module: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = read(artifact)[f"{module}.weight"]
    edit(artifact, {f"{module}.weight": weight.float().bfloat16(), f"{module}.weight_scale": None})
    assert found_in(differences(capsys, artifact)) == {
        ("mtp", f"{module}.weight"), ("mtp", f"{module}.weight_scale")
    }  # fmt: skip


@pytest.mark.parametrize("form", ["dspark nvfp4", "dspark nvfp4-fp8", "mtp nvfp4"])
def test_a_bf16_expert_among_nvfp4_ones_is_named(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = "mtp.0.ffn.experts.1.w1"
    stored = dict.fromkeys(f"{module}.{suffix}" for suffix in NVFP4)
    edit(artifact, {**stored, f"{module}.weight": torch.zeros(128, 256, dtype=torch.bfloat16)})
    assert found_in(differences(capsys, artifact)) == {("mtp", name) for name in (*stored, f"{module}.weight")}


@pytest.mark.parametrize("module", ["mtp.0.attn.wkv", "mtp.0.ffn.experts.2.w2"])
def test_a_scale_of_the_native_release_that_was_left_in_is_named(
    module: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(artifact, {f"{module}.scale": torch.ones(1, 2)})
    assert found_in(differences(capsys, artifact)) == {("mtp", f"{module}.scale")}


@pytest.mark.parametrize("copies", [("head.weight",), ("emb.tok_emb.weight",), ("head.weight", "emb.tok_emb.weight")])
@pytest.mark.parametrize("form", SPARKS)
def test_copies_of_the_shared_head_with_dspark_are_named(
    copies: tuple[str, ...], artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_tensor = read(artifact)["head.weight"]
    planted = {f"mtp.0.{name}": main_tensor for name in copies}
    edit(artifact, planted)
    assert found_in(differences(capsys, artifact)) == {("mtp", name) for name in planted}


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0, 1e-3])
@pytest.mark.parametrize("form", ["mtp nvfp4", "dspark nvfp4", "dspark nvfp4-fp8"])
def test_an_input_scale_of_the_draft_that_is_none_is_named(
    value: float, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"mtp.0.ffn.experts.2.{p}.input_global_scale" for p in ("w1", "w3")]
    edit(artifact, {name: torch.tensor([value]) for name in experts})
    found = differences(capsys, artifact, "--deep")
    assert {one["tensor"] for one in found if one["check"] in ("scales", "inputs")} >= set(experts)


@pytest.mark.parametrize(("form", "name"), [(form, OUTSIDE[kind_of(form)][-1]) for form in FORMS])
def test_a_value_of_the_drafts_head_that_changed_on_the_way_is_named(
    form: str, name: str, artifact: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(artifact, {name: read(artifact)[name].neg()})
    found = differences(capsys, artifact, "--source", str(finished[form].parent / kind_of(form)))
    assert {one["tensor"] for one in found} == {name}


# ------------------------------------------------------------------------------------------------ lists


PAIRS = [(form, other) for form in FORMS for other in FORMS if form != other]


@pytest.mark.parametrize(("form", "other"), PAIRS)
def test_the_ignore_list_of_another_form_is_found(
    other: str, artifact: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(artifact, lambda config: config.update(ignore=ignore_of(finished[other])))
    found = differences(capsys, artifact)
    assert found and {one["check"] for one in found} <= {"targets", "mtp"}


FORGOTTEN = [
    (form, stage) for form in FORMS if form != "dspark nvfp4-fp8" for stage in range(STAGES[kind_of(form)])
]  # fmt: skip


@pytest.mark.parametrize(("form", "stage"), FORGOTTEN)
def test_a_stage_that_the_ignore_list_forgets_is_named(
    stage: int, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = f"layers\\.{LAYERS + stage}\\."
    kept = [entry for entry in ignore_of(artifact) if built not in entry]
    assert len(kept) == len(ignore_of(artifact)) - 1
    edit_config(artifact, lambda config: config.update(ignore=kept))
    named = [one for one in differences(capsys, artifact) if one["check"] == "targets"]
    assert any(f"model.layers.{LAYERS + stage}.attn." in one["found"] for one in named)


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("form", ["dspark nvfp4-fp8"])
def test_a_stage_whose_fused_linears_no_target_names_is_found(
    stage: int, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            group["targets"] = [t for t in group["targets"] if f"layers\\.{LAYERS + stage}\\." not in t]

    edit_config(artifact, forget)
    (one,) = differences(capsys, artifact)
    assert one["check"] == "targets" and f"model.layers.{LAYERS + stage}.attn.fused_wqa_wkv" in one["found"]


@pytest.mark.parametrize("form", ["mtp nvfp4", "dspark nvfp4", "dspark nvfp4-fp8"])
def test_targets_of_the_main_layers_alone_leave_experts_of_the_draft_without_a_scheme(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def narrow(config: dict[str, Any]) -> None:
        (group,) = (g for g in config["config_groups"].values() if g["format"] == "nvfp4-pack-quantized")
        group["targets"] = [rf"re:(?!.*(mtp|layers\.[5-9]))(?:{target[3:]})" for target in group["targets"]]

    edit_config(artifact, narrow)
    found = found_in(differences(capsys, artifact))
    assert ("mtp", "mtp.0.ffn.experts.0.w1.weight") in found and (
        "mtp",
        "mtp.0.ffn.experts.0.w1.weight_packed",
    ) in found


# ------------------------------------------------------------------------------------------------ config.json

KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
Change = Callable[[dict[str, Any]], object]


def says_mtp(config: dict[str, Any]) -> None:
    for key in KEYS:
        del config[key]


def says_dspark(config: dict[str, Any]) -> None:
    ratios = [*config["compress_ratios"], 0, 0]
    config.update(dict(zip(KEYS, (5, 2, [2, 3, 4], 32), strict=True)), compress_ratios=ratios)


REFUSED: Mapping[str, tuple[Change, str]] = {
    **{f"without {key}": (lambda c, key=key: c.pop(key), key) for key in KEYS},
    "two targets": (lambda c: c.update(dspark_target_layer_ids=[3, 4]), "dspark_target_layer_ids"),
    "two stages": (lambda c: c.update(compress_ratios=c["compress_ratios"][:-1]), "dspark_target_layer_ids"),
    "four stages": (lambda c: c.update(compress_ratios=[*c["compress_ratios"], 0]), "dspark_target_layer_ids"),
    "another number of stages for the consumer": (lambda c: c.update(n_mtp_layers=1), "compress_ratios"),
    "that says MTP": (says_mtp, "compress_ratios"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("form", SPARKS)
def test_a_config_json_of_a_dspark_artifact_that_describes_no_draft_is_refused(
    case: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, key = REFUSED[case]
    edit_json(artifact, "config.json", change)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact)])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (1, "")
    assert said.err.count("error: ") == 1 and f"config.json: {key}\n" in said.err


@pytest.mark.parametrize("form", SPARKS)
def test_a_dspark_artifact_whose_config_json_is_an_mtp_release_is_found(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_mtp(config: dict[str, Any]) -> None:
        says_mtp(config)
        del config["compress_ratios"][LAYERS + 1 :]

    edit_json(artifact, "config.json", of_mtp)
    found = found_in(differences(capsys, artifact))
    assert {("mtp", "mtp.0.enorm.weight"), ("mtp", "mtp.0.main_norm.weight"), ("mtp", "mtp.1.hc_attn_fn")} <= found


@pytest.mark.parametrize("form", ["mtp bf16", "mtp nvfp4"])
def test_an_mtp_artifact_whose_config_json_says_dspark_is_found(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(artifact, "config.json", says_dspark)
    found = found_in(differences(capsys, artifact))
    assert {("mtp", "mtp.0.enorm.weight"), ("mtp", "mtp.0.main_norm.weight"), ("mtp", "mtp.1.hc_attn_fn")} <= found
