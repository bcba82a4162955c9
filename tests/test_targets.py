"""Recipe against layout: what is selected, what is refused, and what the published patterns then select."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_named_modules

from dsv4q.checkpoint.source import scan
from dsv4q.config import load_config, parse_config
from dsv4q.layout import TensorSpec, source_tensors
from dsv4q.made_up.toy import ToyConfig
from dsv4q.model.model import build_meta_model
from dsv4q.plan.plan import make_plan
from dsv4q.plan.targets import Selection, published_config, select
from dsv4q.recipe.schemes import Scheme
from runs import CONFIGS

TOY = ToyConfig()
DIMS = TOY.dims
SPECS = source_tensors(DIMS)
EXPERTS = r"re:.*\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"
ATTENTION = r"re:.*\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"
MTP = r"re:^mtp\..*"
SHIPPED = load_config(CONFIGS / "nvfp4-fp8-mtp.yaml")
LINEAR = torch.nn.Linear(1, 1)


def group(*targets: str) -> Scheme:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    return Scheme.model_validate({"targets": targets, "weights": weights})


def chosen(*ignore: str, **groups: tuple[str, ...]) -> Selection:
    return select({name: group(*targets) for name, targets in groups.items()}, ignore, SPECS)


def told(selection: Selection) -> str:
    """The one problem of a selection."""
    assert len(selection.problems) == 1
    return str(selection.problems[0])


# ----------------------------------------------------------------------------------------------- selection


def test_the_shipped_recipe_selects_all_experts_and_attention_projections_of_the_main_layers() -> None:
    selection = select(SHIPPED.groups, SHIPPED.ignore, SPECS)
    wanted = {s.module: "experts" if s.expert is not None else "attention" for s in SPECS if s.is_quantizable}
    assert not selection.problems and selection.group_of == wanted
    assert len(wanted) == 5 * (8 * 3 + 5)


@pytest.mark.parametrize(
    ("ignore", "groups"),
    [
        (SHIPPED.ignore, {name: scheme.targets for name, scheme in SHIPPED.groups.items()}),
        ((MTP,), {"experts": (EXPERTS,)}),
        ((MTP, r"re:model\.layers\.(1|3)\."), {"experts": (EXPERTS,), "attention": (ATTENTION,)}),
        ((MTP,), {"one": ("model.layers.2.self_attn.o_a_proj", "model.layers.0.self_attn.q_b_proj")}),
        ((MTP, "lm_head", r"re:.*(compressor|shared_experts|mlp\.gate)"), {"all": ("Linear",)}),
    ],
)
def test_the_selection_is_that_of_compressed_tensors_on_the_model(
    ignore: tuple[str, ...], groups: dict[str, tuple[str, ...]]
) -> None:
    model = build_meta_model(copy.deepcopy(TOY.as_config_json()), "toy")
    selection = chosen(*ignore, **groups)
    assert not selection.problems
    module_of = {s.hf_name.removesuffix(".weight"): s.module for s in SPECS}
    for name, targets in groups.items():
        theirs = {module_of[found] for found, _ in match_named_modules(model, targets, ignore)}
        assert theirs == {module for module, group_name in selection.group_of.items() if group_name == name}


def test_a_target_that_matches_nothing_is_named() -> None:
    wrong = r"re:.*\.mlp\.expert\.\d+\.up_proj$"
    assert f"found: {wrong}" in told(chosen(MTP, a=(EXPERTS, wrong)))


def test_a_target_in_upstream_names_alone_matches_nothing() -> None:
    wrong = r"re:.*\.ffn\.experts\.\d+\.w1$"
    text = told(chosen(MTP, a=(wrong,)))
    assert "by its transformers name" in text and wrong in text


def test_a_target_that_the_ignore_list_takes_all_from_is_named() -> None:
    assert f"found: {ATTENTION}" in told(chosen(MTP, r"re:.*self_attn", a=(EXPERTS,), b=(ATTENTION,)))


def test_a_module_in_two_groups_is_named_with_both() -> None:
    selection = chosen(MTP, a=(ATTENTION,), b=(r"re:.*\.layers\.0\.self_attn\.o_b_proj$",))
    texts = [str(p) for p in selection.problems]
    assert any("layers.0.attn.wo_b" in text and "a and b" in text for text in texts)


def test_the_class_name_linear_hits_modules_that_must_stay() -> None:
    text = told(chosen(MTP, "lm_head", a=("Linear",)))
    assert "must stay as they are" in text and "layers.0.ffn.shared_experts.w1" in text


@pytest.mark.parametrize(
    ("target", "module"),
    [
        ("lm_head", "head"),
        (r"re:model\.embed_tokens", "embed"),
        (r"re:.*\.mlp\.shared_experts\.up_proj", "layers.0.ffn.shared_experts.w3"),
        (r"re:.*\.mlp\.gate$", "layers.0.ffn.gate"),
        (r"re:.*\.compressor\.kv_proj", "layers.2.attn.compressor.wkv"),
        (r"re:.*\.indexer\.q_b_proj", "layers.2.attn.indexer.wq_b"),
        (r"re:mtp\.0\.e_proj", "mtp.0.e_proj"),
    ],
)
def test_a_target_on_a_module_that_must_stay_is_refused_by_name(target: str, module: str) -> None:
    selection = chosen(MTP if "mtp" not in target else "lm_head", a=(r"re:model\..*self_attn\.o_b_proj$", target))
    text = str(selection.problems[0])
    assert "must stay as they are" in text and module in text and module not in selection.group_of


def test_targets_that_reach_into_mtp_are_refused() -> None:
    text = told(chosen(a=(ATTENTION,)))
    assert "mtp.0.attn.wq_a" in text and "5 others" in text


@pytest.mark.parametrize("one", ["q_a_proj", "kv_proj"])
def test_an_ignore_that_splits_wq_a_from_wkv_is_refused(one: str) -> None:
    text = told(chosen(MTP, rf"re:.*\.layers\.3\.self_attn\.{one}$", a=(ATTENTION,)))
    assert "layers.3: attention wq_a, wkv" in text and "not quantized" in text


def test_an_ignore_that_leaves_some_experts_out_is_refused() -> None:
    text = told(chosen(MTP, r"re:.*\.layers\.1\.mlp\.experts\.[67]\.", a=(EXPERTS,)))
    assert "layers.1: routed experts w1, w2, w3" in text


def test_w2_in_another_group_than_w1_and_w3_is_refused() -> None:
    first, second = (EXPERTS.replace("gate_proj|up_proj|down_proj", p) for p in ("gate_proj|up_proj", "down_proj"))
    selection = chosen(MTP, a=(first,), b=(second,))
    assert len(selection.problems) == DIMS.layers and "a, b" in str(selection.problems[0])


def test_wq_b_and_the_output_projections_may_be_left_out() -> None:
    selection = chosen(MTP, a=(r"re:.*\.self_attn\.(q_a_proj|kv_proj)$",))
    assert not selection.problems and len(selection.group_of) == 2 * DIMS.layers


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (("re:*",), ()),
        (
            (EXPERTS,),
            (
                MTP,
                "re:(",
            ),
        ),
    ],
)
def test_what_is_no_regular_expression_is_refused(targets: tuple[str, ...], ignore: tuple[str, ...]) -> None:
    selection = chosen(*ignore, a=targets)
    assert "not a regular expression" in told(selection) and not selection.group_of


# ----------------------------------------------------------------------------------------------- publication


def modules_of(spec: TensorSpec) -> Iterable[str]:
    """Names by which a consumer may know a main module: upstream, with a prefix, transformers."""
    hf = spec.hf_name.rpartition(".")[0]
    return spec.module, f"model.{spec.module}", hf


def draft_names(spec: TensorSpec) -> Iterable[str]:
    """Names by which a consumer may know a module of the draft: its file's, and as a layer behind the last one."""
    hf = spec.hf_name.rpartition(".")[0]
    behind = f"model.layers.{DIMS.layers + int(spec.block.removeprefix('mtp.'))}"
    for name in (spec.module, hf):
        inner = name.removeprefix(f"{spec.block}.")
        yield from (name, f"model.{name}", f"{behind}.{inner}", f"{behind}.mtp_block.{inner}")


def publish(selection: Selection, groups: dict[str, Scheme]) -> dict[str, Any]:
    assert not selection.problems
    return published_config(groups, selection.group_of, DIMS, "0.17.0")


def matched(published: dict[str, Any], name: str) -> list[str]:
    """Groups that compressed-tensors would put a linear of this name into."""
    return [
        group_name
        for group_name, scheme in published["config_groups"].items()
        if is_match(name, LINEAR, scheme["targets"], published["ignore"])
    ]


SELECTIONS = {
    "shipped": select(SHIPPED.groups, SHIPPED.ignore, SPECS),
    "two layers left out": select(SHIPPED.groups, (*SHIPPED.ignore, r"re:model\.layers\.(0|4)\."), SPECS),
    "experts left out of one layer": select(SHIPPED.groups, (*SHIPPED.ignore, r"re:.*\.layers\.2\.mlp"), SPECS),
    "one projection left out of one layer": select(
        SHIPPED.groups, (*SHIPPED.ignore, "model.layers.1.self_attn.o_a_proj"), SPECS
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_published_targets_select_the_same_modules_in_both_vocabularies(name: str) -> None:
    selection = SELECTIONS[name]
    published = publish(selection, SHIPPED.groups)
    keys = dict(zip(SHIPPED.groups, published["config_groups"], strict=True))
    for spec in (s for s in SPECS if s.block.startswith("layers.")):
        group_name = selection.group_of.get(spec.module)
        for known_as in modules_of(spec):
            assert matched(published, known_as) == ([keys[group_name]] if group_name else []), known_as


@pytest.mark.parametrize("name", SELECTIONS)
def test_published_targets_leave_embedding_head_and_draft_alone_by_all_their_names(name: str) -> None:
    published = publish(SELECTIONS[name], SHIPPED.groups)
    for known_as in ("embed", "head", "lm_head", "model.embed_tokens", "model.norm"):
        assert matched(published, known_as) == []
    for spec in (s for s in SPECS if s.is_mtp):
        for known_as in draft_names(spec):
            assert matched(published, known_as) == [], known_as


def test_published_targets_do_not_reach_a_layer_whose_number_only_begins_alike() -> None:
    dims = ToyConfig(compress_ratios=(0,) * 12).dims
    specs = source_tensors(dims)
    groups = {"a": group(ATTENTION)}
    selection = select(groups, (MTP, r"re:model\.layers\.(0|[2-9]|11)\."), specs)
    published = published_config(groups, selection.group_of, dims, "0.17.0")
    hits = {n for n in range(12) if matched(published, f"model.layers.{n}.self_attn.q_a_proj")}
    assert hits == {1, 10}


def test_all_layers_are_published_by_the_patterns_of_the_contract() -> None:
    published = publish(SELECTIONS["shipped"], SHIPPED.groups)
    attention, experts = (g["targets"] for g in published["config_groups"].values())
    assert attention == [
        r"re:.*\.(attn|self_attn)\.(wq_a|wq_b|wkv|wo_a|wo_b|q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"
    ]
    assert experts == [r"re:.*\.(ffn|mlp)\.experts\.\d+\.(w1|w2|w3|gate_proj|down_proj|up_proj)$"]


def test_the_published_ignore_list_is_that_of_the_contract() -> None:
    two = ToyConfig(num_nextn_predict_layers=2).dims
    published = published_config(SHIPPED.groups, SELECTIONS["shipped"].group_of, two, "0.17.0")
    assert published["ignore"] == [
        "lm_head", r"re:^mtp\..*", r"re:^model\.mtp\..*", r"re:^model\.layers\.5\..*", r"re:^model\.layers\.6\..*",
    ]  # fmt: skip


def test_the_published_groups_are_those_of_the_contract() -> None:
    published = publish(SELECTIONS["shipped"], SHIPPED.groups)
    attention, experts = published["config_groups"].values()
    assert (published["quant_method"], published["format"]) == ("compressed-tensors", "mixed-precision")
    assert published["quantization_status"] == "compressed" and published["version"] == "0.17.0"
    assert attention["format"] == "float-quantized" and experts["format"] == "nvfp4-pack-quantized"
    assert {"strategy": "block", "block_structure": [128, 128], "num_bits": 8, "type": "float", "dynamic": False,
            "symmetric": True}.items() <= attention["weights"].items()  # fmt: skip
    inputs = {"strategy": "group", "group_size": 128, "num_bits": 8, "type": "float", "dynamic": True}
    assert inputs.items() <= attention["input_activations"].items()
    four = {"strategy": "tensor_group", "group_size": 16, "num_bits": 4, "type": "float"}
    assert {**four, "dynamic": False}.items() <= experts["weights"].items()
    assert {**four, "dynamic": "local"}.items() <= experts["input_activations"].items()


def test_no_observer_is_published() -> None:
    published = publish(SELECTIONS["shipped"], SHIPPED.groups)
    for scheme in published["config_groups"].values():
        assert scheme["weights"]["observer"] is None and scheme["input_activations"]["observer"] is None


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_compressed_tensors_reads_the_published_config_as_the_recipe_means_it(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    published = publish(select(config.groups, config.ignore, SPECS), config.groups)
    read = QuantizationConfig.model_validate(published)
    for ours, theirs in zip(config.groups.values(), read.config_groups.values(), strict=True):
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
            assert getattr(theirs.weights, field) == getattr(ours.weights, field)
        assert (theirs.input_activations is None) == (ours.input_activations is None)
        assert theirs.format == ours.compression_format


def test_one_group_alone_gives_its_format_to_the_whole() -> None:
    selection = chosen(MTP, a=(EXPERTS,))
    assert publish(selection, {"a": group(EXPERTS)})["format"] == "pack-quantized"


FIELDS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip
"""Of `QuantizationArgs` in compressed-tensors 0.17, which forbids others."""


def test_no_field_is_published_that_compressed_tensors_0_17_does_not_know() -> None:
    published = publish(SELECTIONS["shipped"], SHIPPED.groups)
    for scheme in published["config_groups"].values():
        assert set(scheme) == {"targets", "weights", "input_activations", "output_activations", "format"}
        assert set(scheme["weights"]) == FIELDS == set(scheme["input_activations"])


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("attention", {"weights": {"block_structure": [64, 64], "observer": None}}, "128x128"),
        ("experts", {"input_activations": {"dynamic": False}}, "dynamic: local"),
    ],
)
def test_a_form_that_the_consumer_cannot_read_is_a_problem_of_the_plan(
    tmp_path: Path, name: str, change: dict[str, dict[str, object]], expected: str
) -> None:
    raw = load_config(CONFIGS / "toy.yaml").model_dump(mode="json")
    groups = raw["recipe"]["quant_stage"]["quant_modifiers"]["QuantizationModifier"]["config_groups"]
    for operand, fields in change.items():
        groups[name][operand].update(fields)
    (tmp_path / "config.json").write_text(json.dumps(ToyConfig().as_config_json()))
    with scan(tmp_path) as checkpoint:
        problems = make_plan(checkpoint, parse_config(raw)).problems
    assert [p for p in problems if "consumer cannot read" in p.what and expected in (p.expected or "")]
