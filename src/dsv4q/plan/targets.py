"""Recipe against layout: which linears each config group quantizes, and how config.json says so.

llmcompressor matches targets on transformers' module names, the consumer on upstream names, so a recipe's own
patterns say nothing about what the consumer will do. What counts here is the set of modules that the recipe
selects; the published targets are written anew from that set, in both vocabularies.

Matching follows compressed-tensors `utils/match.py`: `re:` patterns by `re.match`, else the exact name or the
name of the module's class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4q.errors import Dsv4qError, RecipeError
from dsv4q.layout import (
    ATTENTION_PROJECTIONS,
    EXPERT_PROJECTIONS,
    HF_PROJECTION,
    Dims,
    Role,
    TensorSpec,
)
from dsv4q.plan.draft import LEFT_OUT, DraftForm, further_targets, published_ignore, stages
from dsv4q.recipe.schemes import MIXED, Scheme, published_args

_CLASSES = {Role.EMBEDDING: ("Embedding",), Role.ROUTER: ()}
_LINEAR = ("Linear",)


@dataclass(frozen=True)
class Selection:
    """Outcome of matching a recipe against a model."""

    group_of: Mapping[str, str]
    """Upstream module name -> config group, for every linear to be quantized."""
    problems: tuple[Dsv4qError, ...]


def _hf_module(spec: TensorSpec) -> str:
    return spec.hf_name.rpartition(".")[0]


class _Matcher:
    """The targets of one group or the ignore list, compiled once."""

    def __init__(self, targets: Iterable[str]) -> None:
        self.exact = {t for t in targets if not t.startswith("re:")}
        self.patterns = []
        for target in targets:
            if target.startswith("re:"):
                try:
                    self.patterns.append(re.compile(target[3:]))
                except re.error as error:
                    raise RecipeError("A target is not a regular expression", where=target, found=error) from error

    def matches(self, name: str, classes: tuple[str, ...]) -> bool:
        return (
            name in self.exact
            or any(p.match(name) for p in self.patterns)
            or any(c in self.exact for c in classes)
        )  # fmt: skip


def select(
    groups: Mapping[str, Scheme], ignore: Iterable[str], specs: Iterable[TensorSpec], form: DraftForm = LEFT_OUT
) -> Selection:
    """Match every config group against every module that has a 2-D weight, but for those that the draft's form takes.

    Problems, each a RecipeError: a target that matches nothing, a module that must stay as it is, a module in
    two groups, part of a fused pair or of a layer's experts.
    """
    matrices = [s for s in specs if len(s.shape) == 2 and s.name.endswith(".weight") and not form.quantizes(s)]
    try:
        ignored = _Matcher(tuple(ignore))
        matchers = {name: _Matcher(scheme.targets) for name, scheme in groups.items()}
    except RecipeError as error:
        return Selection({}, (error,))
    group_of: dict[str, str] = {}
    problems: list[Dsv4qError] = []
    forbidden: dict[str, list[str]] = defaultdict(list)
    for spec in matrices:
        hf, classes = _hf_module(spec), _CLASSES.get(spec.role, _LINEAR)
        if ignored.matches(hf, classes):
            continue
        hits = [name for name, matcher in matchers.items() if matcher.matches(hf, classes)]
        if len(hits) > 1:
            problems.append(
                RecipeError(
                    "Two config groups target the same module",
                    where=spec.module,
                    expected="one group for each module",
                    found=" and ".join(hits),
                )
            )
        elif hits and not spec.is_quantizable:
            forbidden[hits[0]].append(spec.module)
        elif hits:
            group_of[spec.module] = hits[0]
    problems += _forbidden(forbidden)
    problems += _unmatched(groups, group_of, matrices)
    problems += _split(group_of, matrices)
    return Selection(group_of, tuple(problems[:100]))


def _forbidden(forbidden: Mapping[str, list[str]]) -> Iterable[RecipeError]:
    for group, modules in forbidden.items():
        yield RecipeError(
            "A config group targets modules that must stay as they are",
            where=f"recipe: config_groups.{group}.targets",
            expected="routed experts and attention projections of the main layers only",
            found=f"{len(modules)} others, such as {', '.join(modules[:3])}",
            hint="make the target narrower or add the modules to ignore",
        )


def _unmatched(
    groups: Mapping[str, Scheme], group_of: Mapping[str, str], matrices: list[TensorSpec]
) -> Iterable[RecipeError]:
    selected = [(s, group_of.get(s.module)) for s in matrices]
    for name, scheme in groups.items():
        for target in scheme.targets:
            matcher = _Matcher((target,))
            reached = any(
                group == name and (matcher.matches(_hf_module(s), _LINEAR) or matcher.matches(s.module, ()))
                for s, group in selected
            )
            if not reached:
                yield RecipeError(
                    "A target matches nothing that would be quantized",
                    where=f"recipe: config_groups.{name}.targets",
                    expected="at least one routed expert or attention projection, by its transformers name",
                    found=target,
                    hint=r"for example re:.*\.mlp\.experts\.\d+\.gate_proj$",
                )


def _split(group_of: Mapping[str, str], matrices: list[TensorSpec]) -> Iterable[RecipeError]:
    """What the consumer fuses must share one scheme: wq_a with wkv, all projections of a layer's experts."""
    fused: dict[str, set[str | None]] = defaultdict(set)
    for spec in matrices:
        if not spec.is_quantizable:
            continue
        projection = spec.module.rpartition(".")[2]
        if spec.expert is not None:
            fused[f"{spec.block}: routed experts w1, w2, w3"].add(group_of.get(spec.module))
        elif projection in ("wq_a", "wkv"):
            fused[f"{spec.block}: attention wq_a, wkv"].add(group_of.get(spec.module))
    for where, found in fused.items():
        if len(found) > 1:
            yield RecipeError(
                "The recipe splits modules that the consumer fuses",
                where=where,
                expected="one config group for all of them, or none",
                found=", ".join(sorted(str(group or "not quantized") for group in found)),
                hint="look at the targets and at ignore",
            )


def published_config(
    groups: Mapping[str, Scheme],
    group_of: Mapping[str, str],
    dims: Dims,
    version: str,
    form: DraftForm = LEFT_OUT,
) -> dict[str, Any]:
    """`quantization_config` for config.json: what compressed-tensors 0.17 and vLLM read.

    Targets name the selected modules in both vocabularies; targets and ignore list give the draft its form under each
    prefix it is known by, see `draft.py`.
    """
    published = {}
    for index, (name, scheme) in enumerate(groups.items()):
        modules = [module for module, group in group_of.items() if group == name]
        published[f"group_{index}"] = {
            "targets": _published_targets(modules, dims),
            "weights": published_args(scheme.weights),
            "input_activations": published_args(scheme.input_activations),
            "output_activations": None,
            "format": scheme.compression_format,
        }
    formats = {group["format"] for group in published.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": published,
        "ignore": published_ignore(form, dims),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": version,
    }


def _published_targets(modules: list[str], dims: Dims) -> list[str]:
    """Where the draft has linears in the group, a target that names layers names the stages of the draft too."""
    layers: dict[str, set[int]] = defaultdict(set)
    drafted = set()
    for module in modules:
        parts = module.split(".")
        if parts[0] == "mtp":
            drafted.add(parts[-1])
        else:
            layers[parts[-1]].add(int(parts[1]))
    by_layers: dict[tuple[frozenset[int], bool], list[str]] = defaultdict(list)
    for projection, where_found in layers.items():
        by_layers[frozenset(where_found), projection in drafted].append(projection)
    targets = []
    for (found, with_draft), projections in by_layers.items():
        numbers = "|".join(map(str, [*sorted(found), *(stages(dims) if with_draft else ())]))
        blocks = rf"layers\.({numbers})"
        if with_draft:
            blocks = rf"({blocks}|mtp\.\d+)"
        where = r"re:.*\." if len(found) == dims.layers else rf"re:(.*\.)?{blocks}\."
        for family, prefix in (
            (ATTENTION_PROJECTIONS, r"(attn|self_attn)\."),
            (EXPERT_PROJECTIONS, r"(ffn|mlp)\.experts\.\d+\."),
        ):
            names = [p for p in family if p in projections]
            if names:
                choice = "|".join(names + [HF_PROJECTION[p] for p in names])
                targets.append(rf"{where}{prefix}({choice})$")
    if any(".shared_experts." in module for module in modules):
        targets += further_targets(dims)
    return targets
