"""Configs: what a user may write, what is refused, and that llmcompressor reads the recipes as we do."""

from __future__ import annotations

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmcompressor.recipe import Recipe
from pydantic import BaseModel

from dsv4q.config import Config, DraftChoice, load_config, parse_config, with_dataset
from dsv4q.errors import ConfigError, RecipeError
from dsv4q.recipe.recipe import library_recipe
from dsv4q.recipe.schemes import as_library_scheme, stored_tensors
from dsv4q.run import observers  # noqa: F401 - registers the exact ones
from runs import CONFIGS

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
EXPERTS = r"re:.*\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"
ATTENTION = r"re:.*\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def shipped(name: str = "nvfp4-fp8-mtp") -> dict[str, Any]:
    """A shipped config as plain data, to be changed."""
    raw: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return raw


def modifier(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["recipe"]["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    return found


def recipe(**arguments: Any) -> dict[str, Any]:
    """A config with nothing but this modifier."""
    return {"recipe": {"quant_stage": {"quant_modifiers": {"QuantizationModifier": arguments}}}}


def int4(**weights: Any) -> dict[str, Any]:
    return recipe(config_groups={"experts": {"targets": [EXPERTS], "weights": {**INT4, **weights}}})


def refusal(raw: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, where="my.yaml")
    return caught.value


# ----------------------------------------------------------------------------------------------- shipped configs


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_parses_and_has_both_groups(name: str) -> None:
    assert set(load_config(CONFIGS / f"{name}.yaml").groups) == {"attention", "experts"}


@pytest.mark.parametrize("name", SHIPPED)
def test_llmcompressor_accepts_a_shipped_recipe_and_understands_the_same(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    theirs = Recipe.from_dict(deepcopy(config.recipe)).modifiers[0]
    for group, scheme in theirs.resolved_config.config_groups.items():
        ours = as_library_scheme(config.groups[group])
        ours.weights.observer = ours.weights.observer or "memoryless_minmax"  # what llmcompressor falls back on
        assert ours == scheme
    assert set(theirs.resolved_config.config_groups) == set(config.groups)
    assert theirs.ignore == list(config.ignore)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_handed_to_oneshot_is_the_one_of_the_config(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    handed = library_recipe(config.groups, config.ignore)
    first, second = (Recipe.from_dict(deepcopy(r)).modifiers[0] for r in (config.recipe, handed))
    assert first.resolved_config.config_groups == second.resolved_config.config_groups
    assert first.ignore == second.ignore


def test_the_published_recipe_calibrates_64_samples_of_512_tokens_into_35_shards() -> None:
    config = load_config(CONFIGS / "nvfp4-fp8-mtp.yaml")
    assert config.calibration is not None and config.calibration.dataset == "HuggingFaceH4/ultrachat_200k"
    assert (config.calibration.samples, config.calibration.max_length, config.calibration.tokens) == (64, 512, 32_768)
    assert config.output.shards == 35 and config.draft.keep and config.draft.shared_head_copies is None


def test_the_config_without_mtp_differs_in_nothing_else() -> None:
    with_mtp, without = shipped(), shipped("nvfp4-fp8")
    assert without.pop("draft") == {"keep": False}
    with_mtp.pop("draft")
    assert with_mtp == without


@pytest.mark.parametrize(("name", "needs"), [("nvfp4-fp8-mtp", True), ("toy", True), ("w4a16-fp8-mtp", False)])
def test_a_config_needs_data_if_it_stores_input_scales(name: str, needs: bool) -> None:
    assert load_config(CONFIGS / f"{name}.yaml").needs_data is needs


def test_parsing_a_shipped_config_imports_no_heavy_library() -> None:
    code = (
        "import sys; from pathlib import Path; from dsv4q.config import load_config;"
        f"load_config(Path({str(CONFIGS / 'toy.yaml')!r})).groups;"
        "print(sorted({'torch', 'transformers', 'llmcompressor', 'compressed_tensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize(
    "path",
    ["colour", "calibration.colour", "draft.colour", "activations.colour", "output.colour"],
)
def test_an_unknown_key_is_refused_by_name(path: str) -> None:
    raw = shipped()
    *parents, key = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[key] = "blue"
    error = refusal(raw)
    assert "Unknown key" in str(error) and error.where == f"my.yaml: {path}"


@pytest.mark.parametrize("place", ["", "weights", "input_activations"])
def test_an_unknown_key_of_a_scheme_is_refused_by_name(place: str) -> None:
    raw = shipped()
    group = modifier(raw)["config_groups"]["experts"]
    (group[place] if place else group)["num_bit"] = 4
    error = refusal(raw)
    assert isinstance(error, RecipeError) and "Unknown key in the recipe" in str(error)
    assert error.where == f"my.yaml: recipe: config_groups.experts: {place + '.' if place else ''}num_bit"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("calibration", "samples", 0),
        ("calibration", "samples", "many"),
        ("calibration", "max_length", 7),
        ("calibration", "micro_batch", 0),
        ("calibration", "seed", "x"),
        ("calibration", "chat_mode", "shout"),
        ("calibration", "dataset", None),
        ("draft", "keep", "perhaps"),
        ("draft", "experts", "fp8"),
        ("activations", "experts", "some"),
        ("activations", "scales", "guessed"),
        ("activations", "fallback", "mean"),
        ("activations", "headroom", 0.5),
        ("activations", "headroom", float("nan")),
        ("activations", "headroom", 2000),
        ("output", "shards", 0),
        ("output", "shards", 100_000),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(section: str, key: str, value: object) -> None:
    raw = shipped()
    raw[section][key] = value
    error = refusal(raw)
    assert f"{section}.{key}" in str(error) and error.found == repr(value)


@pytest.mark.parametrize("section", ["recipe", "calibration", "draft", "output"])
def test_a_section_that_is_no_mapping_is_refused(section: str) -> None:
    assert f"my.yaml: {section}" in str(refusal({**shipped(), section: 5}))


def test_a_config_without_a_recipe_is_refused() -> None:
    assert "recipe" in str(refusal({"output": {"shards": 2}}))


def test_several_problems_are_counted() -> None:
    raw = shipped()
    raw["output"]["shards"], raw["calibration"]["samples"], raw["colour"] = 0, 0, 1
    assert "2 more problem(s)" in str(refusal(raw))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "", "17\n"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a mapping"):
        load_config(path)


@pytest.mark.parametrize("data", [b"a: [1\n", b"a: 'b\n", b"\xff\xfe\x00", b"a: \x01\n", b"a: !!python/object:os.x {}"])
def test_a_config_that_is_not_yaml_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text((CONFIGS / "toy.yaml").read_text() + "\noutput:\n  shards: 2\n")
    with pytest.raises(ConfigError, match="'output' stands twice"):
        load_config(path)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("form", ["{}", "{}.yaml", "configs/{}.yaml"])
def test_a_shipped_config_is_taken_by_its_name(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path(form.format(name))) == load_config(CONFIGS / f"{name}.yaml")


def test_a_file_wins_over_a_shipped_config_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy").write_text("recipe: {}\n")
    with pytest.raises(ConfigError):
        load_config(Path("toy"))


def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Path("nvfp4"))
    assert all(name in str(caught.value.expected) for name in SHIPPED)
    assert "dsv4q configs" in str(caught.value.hint)


# ----------------------------------------------------------------------------------------------- plain words


def test_a_bare_recipe_is_called_that() -> None:
    error = refusal(shipped()["recipe"])
    assert "a recipe, not a config" in error.what and "recipe:" in str(error.hint)


@pytest.mark.parametrize("section", ["recipe", "draft", "activations", "output"])
def test_an_empty_section_is_called_that(section: str) -> None:
    error = refusal({**shipped(), section: None})
    assert error.what == f"The section {section} is empty"


def test_a_calibration_section_without_keys_is_called_that_where_it_is_needed() -> None:
    error = refusal({**shipped(), "calibration": None})
    assert error.found == "a section with nothing under it"


@pytest.mark.parametrize(
    ("section", "key", "value", "expected", "found"),
    [
        ("draft", "keep", 0, "true or false", "0"),
        ("draft", "keep", "no", "true or false", "'no'"),
        ("calibration", "samples", True, "an integer", "True, which YAML makes of yes"),
        ("calibration", "samples", "many", "an integer", "'many'"),
        ("calibration", "seed", 1.5, "an integer", "1.5"),
        ("output", "shards", True, "an integer", "True, which YAML makes of yes"),
        ("activations", "headroom", True, "a number", "True, which YAML makes of yes"),
        ("calibration", "split", False, "a text", "False, which YAML makes of yes"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_plain_words(
    section: str, key: str, value: object, expected: str, found: str
) -> None:
    raw = shipped()
    error = refusal({**raw, section: {**raw[section], key: value}})
    assert error.expected == expected
    assert str(error.found).startswith(found)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_config_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such config") as caught:
        load_config(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


# ----------------------------------------------------------------------------------------------- contradictions


def test_without_mtp_there_are_no_head_copies_unless_asked_for() -> None:
    assert not DraftChoice.model_validate({"keep": False}).shared_head_copies


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("draft", {"keep": False, "shared_head_copies": True}, "contradict"),
        ("draft", {"keep": False, "experts": "nvfp4"}, "experts: nvfp4 and keep: false contradict"),
        ("draft", {"keep": False, "linears": "fp8"}, "linears: fp8 and keep: false contradict"),
        ("mtp", {"keep": True, "shared_head_copies": True}, "draft.shared_head_copies instead of mtp.shared_head"),
        ("mtp", None, "draft.keep instead of mtp.keep"),
        ("activations", {"experts": "routed"}, "needs a fallback"),
        ("activations", {"experts": "all", "fallback": "layer_max"}, "never needs one"),
        ("activations", {"scales": "bound", "headroom": 2.0}, "no effect"),
        ("activations", "bound", "calibration data but takes its input scales from bounds"),
        ("calibration", None, "has no calibration section"),
    ],
)
def test_a_contradiction_is_refused(section: str, value: object, told: str) -> None:
    assert told in str(refusal({**shipped(), section: value}))


@pytest.mark.parametrize("section", [{"calibration": {"dataset": "x"}}, {"activations": {"headroom": 2.0}}])
def test_a_section_without_effect_is_refused(section: dict[str, Any]) -> None:
    assert f"no effect: {next(iter(section))}" in str(refusal({**int4(), **section}))


def test_bounds_are_refused_for_inputs_that_have_none() -> None:
    error = refusal({**recipe(scheme={"FP8": [ATTENTION]}), "activations": "bound"})
    assert "Bounds are known for NVFP4 inputs only" in str(error) and "group_0.input_activations" in str(error)


def test_bounds_need_no_data() -> None:
    raw = shipped()
    del raw["calibration"]
    config = parse_config({**raw, "activations": "bound"})
    assert config.activations.scales == "bound" and config.has_input_scales and not config.needs_data


def test_other_data_for_a_config_that_calibrates_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no effect"):
        with_dataset(parse_config(int4()), "mine.jsonl")


def test_other_data_changes_dataset_and_split_alone() -> None:
    config = load_config(CONFIGS / "nvfp4-fp8-mtp.yaml")
    other = with_dataset(config, "mine.jsonl")
    assert other.calibration is not None and config.calibration is not None
    assert (other.calibration.dataset, other.calibration.split) == ("mine.jsonl", None)
    assert other.calibration.tokens == config.calibration.tokens and other.recipe == config.recipe


# ----------------------------------------------------------------------------------------------- recipes


ONE = {"scheme": "W4A16", "targets": [EXPERTS]}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({}, "no modifier"),
        ({"quant_stage": {}}, "no modifier"),
        ({"quant_stage": {"quant_modifiers": {"GPTQModifier": ONE}}}, "found: GPTQModifier"),
        (
            {"quant_stage": {"quant_modifiers": {"QuantizationModifier": ONE, "SmoothQuantModifier": {}}}},
            "QuantizationModifier, SmoothQuantModifier",
        ),
        ({"a_stage": {"a_modifiers": {"QuantizationModifier": ONE}, "b_modifiers": {"QuantizationModifier": ONE}}}, ""),
        ({"quant": {"quant_modifiers": {"QuantizationModifier": ONE}}}, "recipe.quant"),
        ({"quant_stage": {"quant": {"QuantizationModifier": ONE}}}, "recipe.quant_stage.quant"),
        ({"quant_stage": {"quant_modifiers": [{"QuantizationModifier": ONE}]}}, "recipe.quant_stage.quant_modifiers"),
        ({"quant_stage": [ONE]}, "recipe.quant_stage"),
        ({"quant_stage": {7: {}}}, "recipe.quant_stage.7"),
        ({"quant_stage": {"quant_modifiers": {7: {}}}}, "found: 7"),
        ({"quant_stage": {"quant_modifiers": {"QuantizationModifier": None}}}, "has no arguments"),
    ],
)
def test_a_recipe_of_another_form_is_refused(raw: dict[str, Any], told: str) -> None:
    error = refusal({"recipe": raw})
    assert isinstance(error, RecipeError) and told in str(error)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "weights"),
        ({"config_groups": {}}, "no config group"),
        ({"config_groups": [INT4]}, "valid dictionary"),
        ({"config_groups": {"a": "W4A16"}}, "QuantizationScheme"),
        ({"config_groups": {"a": {"targets": [EXPERTS]}}}, "weights"),
        ({"config_groups": {"a": {"targets": EXPERTS, "weights": INT4}}}, "targets"),
        ({"config_groups": {"a": {"targets": [], "weights": INT4}}}, "at least one target"),
        ({"scheme": "W4A17", "targets": [EXPERTS]}, "preset"),
        ({"scheme": {"W4A17": [EXPERTS]}}, "preset"),
        ({"scheme": {"UNQUANTIZED": [EXPERTS]}}, "weights"),
        ({"scheme": "W4A16", "config_groups": {"a": {"targets": [EXPERTS], "weights": INT4}}}, "either"),
        ({**ONE, "ignore": "lm_head"}, "list of module names"),
        ({**ONE, "ignore": [7]}, "list of module names"),
        ({**ONE, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**ONE, "weight_observer": "minmux"}, "no such observer"),
    ],
)
def test_wrong_arguments_of_the_modifier_are_refused(arguments: dict[str, Any], told: str) -> None:
    error = refusal(recipe(**arguments))
    assert isinstance(error, RecipeError) and told in str(error)


def test_an_error_in_a_recipe_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(int4(num_bits=17)))
    with pytest.raises(RecipeError) as caught:
        load_config(path)
    assert caught.value.where == f"{path}: recipe: config_groups.experts: weights.num_bits"
    assert str(path) in str(caught.value)


def test_presets_store_what_the_spelled_out_groups_store() -> None:
    raw = shipped()
    modifier(raw).clear()
    modifier(raw).update(scheme={"FP8_BLOCK": [ATTENTION], "NVFP4": [EXPERTS]}, ignore=["re:^mtp"])
    preset, spelled = parse_config(raw), parse_config(shipped())
    for one, other in zip(preset.groups.values(), spelled.groups.values(), strict=True):
        assert one.compression_format == other.compression_format
        assert stored_tensors(one, (256, 512)) == stored_tensors(other, (256, 512))
    assert preset.needs_data and preset.ignore == ("re:^mtp",)


@pytest.mark.parametrize("targets", [EXPERTS, [EXPERTS]])
def test_a_preset_may_be_one_name_with_targets_beside_it(targets: object) -> None:
    (group,) = parse_config(recipe(scheme="w4a16", targets=targets)).groups.values()
    assert group.targets == (EXPERTS,) and group.weights.group_size == 128


def test_an_observer_shorthand_reaches_every_group() -> None:
    raw = int4()
    modifier(raw)["weight_observer"] = "memoryless_mse"
    assert parse_config(raw).groups["experts"].weights.observer == "memoryless_mse"


def test_parsing_leaves_the_given_mapping_as_it_is() -> None:
    raw = recipe(scheme={"W4A16": EXPERTS})
    before = deepcopy(raw)
    parse_config(raw)
    assert raw == before


def test_configs_that_mean_the_same_have_one_canonical_form() -> None:
    raw = shipped()
    group = modifier(raw)["config_groups"]["attention"]
    group["weights"] = dict(reversed(group["weights"].items()))
    group["weights"]["type"] = "FLOAT"
    del raw["output"]
    assert parse_config(raw).canonical() == parse_config(shipped()).canonical()


# ----------------------------------------------------------------------------------------------- documentation


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted key -> default as docs/config.md writes it, for every key but the sections themselves."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        section = next((t for t in inner if issubclass(t, BaseModel)), None)
        if section is not None:
            found |= defaults(section, f"{prefix}{name}.")
        else:
            value = "required" if field.is_required() else field.default
            found[f"{prefix}{name}"] = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return found


def test_the_documentation_lists_every_key_with_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", text, re.MULTILINE)
    documented = {key: re.sub(r"`|(?<=required).*", "", default) for key, default in rows}
    assert documented == defaults(Config)
