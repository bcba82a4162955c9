"""llmcompressor's recipe, as the config holds it -> config groups, and back to what `oneshot` runs.

    quant_stage: quant_modifiers: QuantizationModifier: config_groups or scheme, targets, ignore, observers

Presets and observer shorthands are llmcompressor's to expand; spelled-out groups need no heavy import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from dsv4q.errors import RecipeError
from dsv4q.recipe.schemes import Scheme, scheme_dict

_MODIFIER_KEYS = (
    "config_groups", "ignore", "scheme", "targets", "weight_observer", "input_observer", "observer"
)  # fmt: skip


def groups_of(recipe: dict[str, Any]) -> dict[str, Scheme]:
    """Config groups of a recipe by name.

    Raises:
        RecipeError: not of llmcompressor's form, or not one that dsv4q can run.
    """
    modifier = _modifier(recipe)
    if set(modifier) <= {"config_groups", "ignore"} and isinstance(modifier.get("config_groups"), dict):
        raw = modifier["config_groups"]
        if all(isinstance(group, dict) for group in raw.values()):
            return {str(name): _scheme(str(name), group) for name, group in raw.items()}
    return _resolve_with_library(recipe)


def ignored(recipe: dict[str, Any]) -> tuple[str, ...]:
    """Ignore entries of a recipe; raises as `groups_of`."""
    return tuple(_modifier(recipe).get("ignore") or ())


def library_recipe(groups: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The recipe for `oneshot` that has these groups, each with its format stated."""
    plain = {name: scheme_dict(scheme) for name, scheme in groups.items()}
    modifier = {"config_groups": plain, "ignore": list(ignore)}
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}


_PLAINLY = {
    "bool_type": "true or false", "int_type": "an integer", "float_type": "a number", "string_type": "a text",
    "missing": "this key, which is required", "model_type": "a mapping of keys", "dict_type": "a mapping of keys",
}  # fmt: skip
"""Types of pydantic's errors -> what would have been right, in words of YAML."""


def explain(error: ValidationError, where: str, document: str, keys: str) -> dict[str, str]:
    """First problem of a pydantic error as arguments of a Dsv4qError, the number of the others in the hint.

    Args:
        error: of the whole document or a part of it.
        where: that document or part.
        document: what the user calls it: config or recipe.
        keys: which keys it may have.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "top level"
    details = {"where": f"{where}: {key}", "found": repr(first["input"])[:200]}
    if first["type"] == "extra_forbidden":
        details |= {"what": f"Unknown key in the {document}", "expected": keys}
    else:
        expected = first["msg"].removeprefix("Value error, ")
        details |= {"what": f"Wrong value in the {document}: {key}", "expected": _PLAINLY.get(first["type"], expected)}
        if first["type"] == "missing":
            details["found"] = "no such key"
        if isinstance(first["input"], bool):
            details["found"] += ", which YAML makes of yes, no, on and off too"
    if error.error_count() > 1:
        details["hint"] = f"{error.error_count() - 1} more problem(s) in this config"
    return details


def _modifier(recipe: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the one QuantizationModifier of a recipe."""
    found: list[tuple[str, Any]] = []
    for stage, modifiers in recipe.items():
        for group, members in _members(stage, "_stage", modifiers, "recipe"):
            found += _members(group, "_modifiers", members, f"recipe.{stage}")
    names = [str(name) for name, _ in found]
    if names != ["QuantizationModifier"]:
        raise RecipeError(
            "dsv4q runs recipes with exactly one QuantizationModifier",
            where="recipe",
            expected="QuantizationModifier",
            found=", ".join(names) or "no modifier",
        )
    arguments = found[0][1]
    if not isinstance(arguments, dict):
        raise RecipeError(
            "The QuantizationModifier of the recipe has no arguments",
            where="recipe: QuantizationModifier",
            expected="config_groups, or scheme, and ignore",
            found=repr(arguments),
        )
    _check_arguments(arguments)
    return dict(arguments)


def _members(name: object, suffix: str, value: object, where: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(name, str) or not name.endswith(suffix) or not isinstance(value, dict):
        raise RecipeError(
            "The recipe is not in llmcompressor's form",
            where=f"{where}.{name}",
            expected="<name>_stage: <name>_modifiers: QuantizationModifier: ...",
            found=f"{name}: {type(value).__name__}",
        )
    return value.items()


def _check_arguments(arguments: dict[str, Any]) -> None:
    where = "recipe: QuantizationModifier"
    for key in arguments:
        if key not in _MODIFIER_KEYS:
            raise RecipeError(
                "The recipe's modifier has an argument that dsv4q does not know",
                where=f"{where}.{key}",
                expected=", ".join(_MODIFIER_KEYS),
                found=key,
            )
    ignore = arguments.get("ignore")
    if ignore is not None and not (isinstance(ignore, list) and all(isinstance(entry, str) for entry in ignore)):
        raise RecipeError(
            "Wrong value in the recipe: ignore",
            where=f"{where}.ignore",
            expected="a list of module names and re: patterns",
            found=repr(ignore)[:200],
        )


def _scheme(name: str, raw: dict[str, Any]) -> Scheme:
    try:
        return Scheme.model_validate(raw)
    except ValidationError as error:
        keys = "only fields of llmcompressor's config groups, which are compressed-tensors' own"
        raise RecipeError(**explain(error, f"recipe: config_groups.{name}", "recipe", keys)) from error


def _resolve_with_library(recipe: dict[str, Any]) -> dict[str, Scheme]:
    """Let llmcompressor expand presets (`scheme: NVFP4`) and observer shorthands (imports it: seconds)."""
    from llmcompressor.recipe import Recipe

    try:
        modifier = Recipe.from_dict(deepcopy(recipe)).modifiers[0]
        groups = modifier.resolved_config.config_groups
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        found = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else error
        raise RecipeError("llmcompressor refuses this recipe", where="recipe", found=found) from error
    return {name: _scheme(name, group.model_dump(mode="json", exclude_unset=True)) for name, group in groups.items()}
