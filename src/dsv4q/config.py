"""The YAML that a user writes: what to make. How to run it (device, resume) is on the command line.

    recipe:        a genuine llmcompressor recipe: what `oneshot(recipe=...)` accepts
    calibration:   data, samples, length, micro-batch, seed; left out when the recipe needs no data
    draft:         keep the draft, in which form
    activations:   which tokens the routed experts see while calibrating, headroom
    output:        number of shards

Everything is frozen and unknown keys are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsv4q.data.spec import Calibration
from dsv4q.errors import ConfigError, RecipeError
from dsv4q.recipe.recipe import explain, groups_of, ignored, library_recipe
from dsv4q.recipe.schemes import Scheme


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DraftChoice(_Frozen):
    """How the draft goes into the artifact. What is left out follows from the kind of draft that the source has."""

    keep: bool = True
    experts: Literal["bf16", "nvfp4"] | None = None
    """Its routed experts; left out: `bf16` with MTP, and with DSpark `nvfp4` if the recipe stores experts so."""
    linears: Literal["bf16", "fp8"] = "bf16"
    """Of DSpark: its attention projections, shared experts and main_proj."""
    shared_head_copies: bool | None = None
    """Also write `mtp.N.emb.tok_emb.weight` and `mtp.N.head.weight`, which older loaders of MTP need; left out: with
    MTP alone, for with DSpark they break the consumer's loader."""

    @model_validator(mode="after")
    def _agree(self) -> DraftChoice:
        for name in ("experts", "shared_head_copies"):
            if not self.keep and getattr(self, name):
                raise ValueError(f"{name}: {str(getattr(self, name)).lower()} and keep: false contradict each other")
        if self.linears == "fp8" and not self.keep:
            raise ValueError("linears: fp8 and keep: false contradict each other")
        return self


class Activations(_Frozen):
    """How the input scales of the routed experts are found. `activations: bound` is short for `scales: bound`."""

    scales: Literal["observed", "bound"] = "observed"
    """`observed`: the largest magnitude that calibration sees. `bound`: the largest possible one, without any data."""
    experts: Literal["all", "routed"] = "all"
    """`all`: every expert sees every token. `routed`: only the tokens that the router sends it."""
    fallback: Literal["layer_max"] | None = None
    """With `routed`: an expert without tokens takes the largest amax of its layer and projection."""
    headroom: float = Field(1.0, ge=1.0, le=1024.0)
    """Factor on the observed amax. Clipping is what hurts; up to about 1000 costs nothing measurable."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, raw: Any) -> Any:
        return {"scales": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _agree(self) -> Activations:
        if self.scales == "bound" and (self.experts != "all" or self.headroom != 1.0 or self.fallback):
            raise ValueError("scales: bound observes nothing, so experts, fallback and headroom have no effect")
        if self.experts == "all" and self.fallback is not None:
            raise ValueError("fallback is given but experts: all never needs one")
        if self.experts == "routed" and self.fallback is None:
            raise ValueError("experts: routed needs a fallback (layer_max) for experts that no token reaches")
        return self


class Output(_Frozen):
    """The files of the artifact."""

    shards: int = Field(35, ge=1, le=99_999)


class Config(_Frozen):
    """A parsed and checked config."""

    recipe: dict[str, Any]
    calibration: Calibration | None = None
    draft: DraftChoice = DraftChoice()
    activations: Activations = Activations()
    output: Output = Output()

    @cached_property
    def groups(self) -> dict[str, Scheme]:
        """Config groups of the recipe by name."""
        return groups_of(self.recipe)

    @cached_property
    def ignore(self) -> tuple[str, ...]:
        """Ignore entries of the recipe."""
        return ignored(self.recipe)

    @property
    def has_input_scales(self) -> bool:
        """Whether an input of some linear is quantized under a scale that the artifact stores."""
        return any(s.input_activations is not None and s.input_activations.needs_data for s in self.groups.values())

    @property
    def needs_data(self) -> bool:
        """Whether the run has to calibrate."""
        return self.has_input_scales and self.activations.scales == "observed"

    def canonical(self) -> dict[str, Any]:
        """JSON-able form; two configs that mean the same have the same one."""
        plain = self.model_dump(mode="json", exclude={"recipe"})
        groups = {name: scheme.model_dump(mode="json") for name, scheme in self.groups.items()}
        return {"recipe": {"config_groups": groups, "ignore": list(self.ignore)}, **plain}


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice in a mapping is an error: plain YAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


_SHIPPED = Path(__file__).parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """The configs that come with dsv4q, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def summary_of(path: Path) -> str:
    """What a shipped config says of itself: its first sentence."""
    comment = path.read_text(encoding="utf-8").partition("\n\n")[0].partition("\nrecipe:")[0]
    return " ".join(line.removeprefix("#").strip() for line in comment.splitlines()).partition(". ")[0].rstrip(".")


def config_file(given: Path) -> Path:
    """The file that `--config` means: one that is there, else a shipped config by its name.

    Raises:
        ConfigError: neither.
    """
    if given.is_file():
        return given
    shipped = shipped_configs()
    name = str(given).removeprefix("configs/").removesuffix(".yaml")
    if name not in shipped:
        raise ConfigError(
            "There is no such config",
            where=given,
            expected=f"a YAML file, or one of {', '.join(shipped)}",
            hint="`dsv4q configs` lists the shipped ones, `dsv4q configs NAME > mine.yaml` copies one",
        )
    return shipped[name]


def load_config(given: Path) -> Config:
    """Read a config YAML, or a shipped config by its name.

    Raises:
        ConfigError: absent, not YAML, unknown key, wrong value, contradiction.
        RecipeError: the recipe is not one that dsv4q can run.
    """
    path = config_file(given)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("The config is not valid YAML", where=path, found=error) from error
    return parse_config(raw, where=str(path))


def parse_config(raw: object, where: str = "config") -> Config:
    """Check a parsed YAML document; see `load_config` for the errors."""
    if not isinstance(raw, dict):
        raise ConfigError("The config is not a mapping", where=where, found=type(raw).__name__)
    _check_sections(raw, where)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(**explain(error, where, "config", "only keys that docs/config.md lists")) from error
    try:
        groups = config.groups
    except RecipeError as error:
        raise error.but(where=f"{where}: {error.where or 'recipe'}") from error.__cause__
    if not groups:
        raise RecipeError(
            "The recipe has no config group", where=where, hint="`dsv4q configs nvfp4-fp8-mtp` shows an example"
        )
    if not config.has_input_scales:
        _check_no_effect(config, where)
    if config.activations.scales == "bound":
        _check_bound(config, where)
    if config.needs_data and config.calibration is None:
        raise ConfigError(
            "The recipe has calibrated activations but the config has no calibration section",
            where=where,
            expected="calibration with at least a dataset",
            found="a section with nothing under it" if "calibration" in raw else "no such section",
            hint="or activations: bound, which needs no data",
        )
    return config


def _check_sections(raw: dict[Any, Any], where: str) -> None:
    """What pydantic would call by another name: a recipe that is no config yet, a section without a key."""
    if raw and all(isinstance(key, str) and key.endswith("_stage") for key in raw):
        raise ConfigError(
            "This is a recipe, not a config",
            where=where,
            expected="a config, of which the recipe is the section `recipe`",
            found=", ".join(raw),
            hint="put it under `recipe:`, with `calibration:` beside it; `dsv4q configs nvfp4-fp8-mtp` shows one",
        )
    if "mtp" in raw:
        raise ConfigError(
            "The section mtp has another name: draft",
            where=f"{where}: mtp",
            expected="draft.keep instead of mtp.keep, draft.shared_head_copies instead of mtp.shared_head_copies",
            found=repr(raw["mtp"])[:200],
            hint="docs/config.md has what else the draft section can say",
        )
    for name, section in raw.items():
        if section is None and name in Config.model_fields and name != "calibration":  # which may be none
            raise ConfigError(
                f"The section {name} is empty",
                where=f"{where}: {name}",
                expected="keys, as docs/config.md lists them, or no such section",
                found="nothing under it",
            )


def config_of(canonical: Mapping[str, Any], where: str = "config") -> Config:
    """The config that has this canonical form (`Config.canonical`).

    Raises:
        KeyError: it is no such form.
        ConfigError, RecipeError: as `parse_config`.
    """
    stated = canonical["recipe"]
    groups = {name: Scheme.model_validate(group) for name, group in stated["config_groups"].items()}
    return parse_config({**canonical, "recipe": library_recipe(groups, stated["ignore"])}, where)


def _check_no_effect(config: Config, where: str) -> None:
    for section, given in (
        ("calibration", config.calibration is not None),
        ("activations", config.activations != Activations()),
    ):
        if given:
            raise ConfigError(
                f"The config has a section that would have no effect: {section}",
                where=f"{where}: {section}",
                expected="a recipe that stores input scales, or no such section",
                found="a recipe in which every quantized input is dynamic, or none is quantized",
                hint=f"leave the {section} section out",
            )


def _check_bound(config: Config, where: str) -> None:
    if config.calibration is not None:
        raise ConfigError(
            "The config has calibration data but takes its input scales from bounds",
            where=f"{where}: activations.scales, calibration",
            hint="leave the calibration section out, or set activations.scales to observed",
        )
    for name, scheme in config.groups.items():
        inputs = scheme.input_activations
        if inputs is not None and inputs.needs_data and inputs.strategy != "tensor_group":
            raise ConfigError(
                "Bounds are known for NVFP4 inputs only",
                where=f"{where}: activations.scales, config_groups.{name}.input_activations",
                expected="strategy tensor_group with dynamic: local",
                found=f"strategy {inputs.strategy}",
            )


def with_dataset(config: Config, dataset: str, split: str | None = None) -> Config:
    """The same config on other data (`--data`).

    Raises:
        ConfigError: the config calibrates nothing.
    """
    if config.calibration is None:
        raise ConfigError("This config calibrates nothing, so --data has no effect", where="--data", found=dataset)
    return config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"dataset": dataset, "split": split})}
    )
