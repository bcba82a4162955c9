"""Pure planning: config + layout + headers -> every output tensor, its bytes, its shard, its offset.

No tensor is read and nothing is imported that takes seconds. The run executes this very object.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dsv4q.checkpoint.against_layout import compare_with_layout, draft_kind
from dsv4q.checkpoint.alike import packed_alike
from dsv4q.checkpoint.pin import Pin, pin_of
from dsv4q.checkpoint.shards import PlannedTensor, ShardPlan, balanced_shards, blocks_of
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.config import Config
from dsv4q.errors import ConfigError, Dsv4qError, RecipeError
from dsv4q.layout import HEAD_COPIES, NO_DRAFT, Dims, Shape, TensorSpec, source_tensors
from dsv4q.plan.draft import DraftForm, is_fp8_blocks, recipe_targets
from dsv4q.plan.model_config import carried_config, rotary_problem
from dsv4q.plan.needs import CUDA_BYTES, Estimate, estimate
from dsv4q.plan.origin import ASSUMED_NATIVE, Origin, SourceFiles
from dsv4q.plan.targets import published_config, select
from dsv4q.recipe.recipe import library_recipe
from dsv4q.recipe.schemes import FLOAT, NVFP4, Scheme, stored_tensors

QUANTIZATION_VERSION = "0.17.0"
"""compressed-tensors version stated in config.json: the oldest one whose fields we write."""


@dataclass(frozen=True)
class Plan(ShardPlan):
    """What a run will read, make and write."""

    source: str
    pin: Pin
    dims: Dims
    config: Config
    source_specs: tuple[TensorSpec, ...]
    """The tensors of the model, as BF16."""
    source_files: SourceFiles
    origin: Origin | None
    """The release that the source is, if it is known."""
    group_of: dict[str, str]
    artifact_config: dict[str, Any]
    """The config.json to write."""
    draft: str
    """Kind of draft that the source has: none, mtp, dspark, unknown."""
    experts_in_stacks: bool
    """Whether the routed experts of a block are encoded in one way that takes them all at once."""
    experts_packed: bool
    """Whether routed experts that are computed with may stay on the device as they lie in the files until then."""
    draft_form: DraftForm
    estimate: Estimate
    free_disk: int | None
    problems: tuple[Dsv4qError, ...]
    warnings: tuple[Dsv4qError, ...] = ()
    """What deserves attention but stops nothing."""

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Units of work in order, those of which nothing is written too."""
        return tuple(dict.fromkeys(s.block for s in self.source_specs))

    def library_recipe(self) -> dict[str, Any]:
        """The recipe for `oneshot`: the user's, with every group's format stated, and what the draft needs."""
        of_draft = {module: group for module, group in self.group_of.items() if module.startswith("mtp.")}
        groups, ignore = recipe_targets(self.config.groups, self.config.ignore, of_draft, self.source_specs)
        return library_recipe(groups, ignore)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything but the list of tensors."""
        mtp = [t for t in self.tensors if t.name.startswith("mtp.")]
        return {
            "source": {
                "path": self.source,
                "pin": self.pin.as_dict(),
                "layout": self.source_files.layout,
                "forms": self.source_files.forms,
                "tensors": self.source_files.tensors,
                "bytes": self.source_files.nbytes,
                "model": {"tensors": len(self.source_specs), "bytes": sum(s.nbytes for s in self.source_specs)},
                "release": None if self.origin is None else self.origin.as_dict(),
                "classes": _classes((s, *self.source_files.entries[s.name]) for s in self.source_specs),
                "draft": self.draft,
            },
            "artifact": {
                "tensors": len(self.tensors),
                "bytes": self.artifact_bytes,
                "classes": _classes((t.spec, 1, t.nbytes) for t in self.tensors),
                "mtp_tensors": len(mtp),
                "mtp_bytes": sum(t.nbytes for t in mtp),
                "draft": self.draft_form.as_dict(),
                "quantized_linears": dict(Counter(self.group_of.values())),
                "shards": [
                    {"file": s.file, "tensors": len(s.tensors), "bytes": s.nbytes, "blocks": blocks_of(s)}
                    for s in self.shards
                ],
            },
            "needs": {
                "host_bytes": self.estimate.host,
                "gpu_bytes": self.estimate.gpu[0].nbytes + CUDA_BYTES,
                "least_gpu_bytes": self.estimate.gpu_least + CUDA_BYTES,
                "disk_bytes": self.estimate.disk,
                "free_disk_bytes": self.free_disk,
                "calibration_tokens": self.estimate.calibration_tokens,
                "streams_bytes": self.estimate.streams,
                "streams_elsewhere": self.estimate.streams_elsewhere,
            },
            "problems": [p.as_dict() for p in self.problems],
            "warnings": [w.as_dict() for w in self.warnings],
        }


def _classes(items: Iterable[tuple[TensorSpec, int, int]]) -> dict[str, dict[str, int]]:
    """Tensors and bytes by class, of (tensor of the model, tensors, bytes)."""
    found: dict[str, dict[str, int]] = {}
    for spec, count, nbytes in items:
        entry = found.setdefault(spec.class_name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += count
        entry["bytes"] += nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def make_plan(checkpoint: Checkpoint, config: Config, *, free_disk: int | None = None) -> Plan:
    """Plan a run.

    Problems of the source, of the recipe against the layout, and of the disk are collected in `Plan.problems`.

    Raises:
        SourceError: config.json does not describe a DeepSeek-V4 model.
        ConfigError: more shards than there are pieces to put into them; contradictions between config and source.
    """
    dims = Dims.from_config(checkpoint.config, checkpoint.root / "config.json")
    specs = source_tensors(dims)
    problems: list[Dsv4qError] = list(checkpoint.problems)
    if checkpoint.has_weights:
        problems += compare_with_layout(checkpoint, dims)
    rotary = rotary_problem(checkpoint.config, checkpoint.config_file)
    problems += [] if rotary is None else [rotary]
    form = DraftForm.of(config, dims)
    selection = select(config.groups, config.ignore, specs, form)
    problems += selection.problems
    of_draft = form.groups(config, selection.group_of, specs)
    problems += form.problems(config, dims, of_draft)
    group_of = {**selection.group_of, **of_draft}
    tensors, misfits = _artifact_tensors(specs, config, form, group_of)
    problems += misfits
    problems += _unread_by_the_consumer(config)
    problems += _unbounded_inputs(tensors, config)
    problems += checkpoint.holes.problems
    shards = balanced_shards(tensors, config.output.shards)
    files = SourceFiles.of(checkpoint, specs)
    in_stacks = _experts_in_stacks(specs, config, group_of)
    packed = in_stacks and (
        _experts_packed(checkpoint, specs, group_of) if checkpoint.has_weights else files.layout == ASSUMED_NATIVE
    )
    needs = estimate(specs, shards, config, dims, lambda name: files.entries[name][1] if packed else 0)
    carried, odd_keys = carried_config(checkpoint.config, checkpoint.config_file)
    names = checkpoint.tensors if checkpoint.has_weights else (s.name for s in specs)
    return Plan(
        source=str(checkpoint.root),
        pin=pin_of(checkpoint),
        dims=dims,
        config=config,
        source_specs=tuple(specs),
        source_files=files,
        origin=Origin.of(checkpoint, dims, specs, files),
        shards=shards,
        group_of=group_of,
        artifact_config=_artifact_config(carried, config, dims, group_of, form),
        draft=draft_kind(names),
        experts_in_stacks=in_stacks,
        experts_packed=packed,
        draft_form=form,
        estimate=needs,
        free_disk=free_disk,
        problems=tuple(problems),
        warnings=(*checkpoint.warnings, *checkpoint.holes.warnings, *odd_keys),
    )


def _experts_in_stacks(specs: Sequence[TensorSpec], config: Config, group_of: Mapping[str, str]) -> bool:
    """See `Plan.experts_in_stacks`."""
    groups: dict[bool, set[str | None]] = {True: set(), False: set()}
    for spec in specs:
        if spec.expert is not None:
            groups[spec.is_mtp].add(group_of.get(spec.module))
    if groups[True] == {None}:
        groups[True].clear()
    return all(
        len(some) == 1 and all(group is not None and config.groups[group].in_stacks for group in some)
        for some in groups.values()
        if some
    )


def _experts_packed(checkpoint: Checkpoint, specs: Sequence[TensorSpec], group_of: Mapping[str, str]) -> bool:
    """Whether all routed experts that are encoded are stored in one form."""
    by_projection: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        if spec.expert is not None and (not spec.is_mtp or spec.module in group_of):
            by_projection[spec.module.rpartition(".")[2]].append(spec.name)
    return all(packed_alike(checkpoint, names) is not None for names in by_projection.values())


def _unread_by_the_consumer(config: Config) -> Iterator[RecipeError]:
    """Schemes that compressed-tensors stores but vLLM reads as something else, or not at all."""
    for name, scheme in config.groups.items():
        weights, inputs = scheme.weights, scheme.input_activations
        if scheme.compression_format == NVFP4:
            fits = (weights.strategy, weights.group_size, weights.symmetric) == ("tensor_group", 16, True)
            fits = fits and (inputs is None or (inputs.strategy, inputs.dynamic) == ("tensor_group", "local"))
            expected = "symmetric tensor_group of 16; inputs none, or tensor_group with dynamic: local"
        elif scheme.compression_format == FLOAT and weights.strategy == "block":
            fits, expected = weights.block_structure == (128, 128), "blocks of 128x128"
        else:
            continue
        if not fits:
            yield RecipeError(
                "The consumer cannot read this form of the scheme",
                where=f"recipe: config_groups.{name}",
                expected=f"{scheme.compression_format} with {expected}",
                found=f"weights {weights.strategy} {weights.block_structure or weights.group_size}"
                + ("" if inputs is None else f", inputs {inputs.strategy}, dynamic: {inputs.dynamic}"),
            )


def _unbounded_inputs(tensors: Sequence[PlannedTensor], config: Config) -> Iterator[ConfigError]:
    """Input scales that `activations: bound` cannot give: only those of routed experts have a bound."""
    if config.activations.scales != "bound":
        return
    others = [t.name for t in tensors if t.name.endswith(".input_global_scale") and t.spec.expert is None]
    if others:
        yield ConfigError(
            "Input scales of linears outside the experts have no analytic bound",
            where="activations: bound",
            expected="input scales of routed experts alone",
            found=f"{len(others)} others, the first {others[0]}",
            hint="calibrate on data, or quantize these linears in a scheme without global input scales",
        )


def _artifact_tensors(
    specs: list[TensorSpec], config: Config, form: DraftForm, group_of: dict[str, str]
) -> tuple[list[PlannedTensor], list[Dsv4qError]]:
    stored: dict[tuple[str, Shape], tuple[tuple[str, str, Shape], ...]] = {}
    problems: list[Dsv4qError] = []
    tensors: list[PlannedTensor] = []
    for spec in specs:
        if spec.is_mtp and form.kind == NO_DRAFT:
            continue
        group = group_of.get(spec.module)
        if group is None:
            tensors.append(PlannedTensor(spec.name, spec.dtype, spec.shape, spec, False, spec.block))
            continue
        key = (group, spec.shape)
        if key not in stored:
            stored[key] = _stored(config.groups[group], spec, form, problems)
        for suffix, dtype, shape in stored[key]:
            tensors.append(PlannedTensor(f"{spec.module}.{suffix}", dtype, shape, spec, True, spec.block))
    if form.head_copies:
        tensors += _head_copies(specs)
    return tensors, problems


def _stored(
    scheme: Scheme, spec: TensorSpec, form: DraftForm, problems: list[Dsv4qError]
) -> tuple[tuple[str, str, Shape], ...]:
    try:
        found = stored_tensors(scheme, spec.shape)
        if is_fp8_blocks(scheme):
            return tuple((name, form.scale_dtype if name == "weight_scale" else d, shape) for name, d, shape in found)
        return found
    except Dsv4qError as error:
        error.where = error.where or spec.name
        error.args = (error.text(),)
        problems.append(error)
        return (("weight", spec.dtype, spec.shape),)


def _head_copies(specs: list[TensorSpec]) -> Iterator[PlannedTensor]:
    by_name = {s.name: s for s in specs}
    for block in dict.fromkeys(s.block for s in specs if s.is_mtp):
        for suffix, main in HEAD_COPIES.items():
            spec = by_name[main]
            yield PlannedTensor(f"{block}.{suffix}", spec.dtype, spec.shape, spec, False, block)


def _artifact_config(
    source: dict[str, Any], config: Config, dims: Dims, group_of: dict[str, str], form: DraftForm
) -> dict[str, Any]:
    """The keys that go on of the source's config.json, with our quantization_config.

    Without a draft num_nextn_predict_layers is 0, and the keys that describe a DSpark draft are gone.
    """
    result = dict(source)
    if form.kind == NO_DRAFT:
        if "num_nextn_predict_layers" in result:
            result["num_nextn_predict_layers"] = 0
        result = {key: value for key, value in result.items() if not key.startswith("dspark_")}
    result["quantization_config"] = published_config(config.groups, group_of, dims, QUANTIZATION_VERSION, form)
    return result


def with_problem(plan: Plan, problem: Dsv4qError | None, *, stops: bool = True) -> Plan:
    """The same plan with one more problem, or a warning if it `stops` nothing, if there is one."""
    if problem is None:
        return plan
    if stops:
        return replace(plan, problems=(*plan.problems, problem))
    return replace(plan, warnings=(*plan.warnings, problem))


def artifact_config_text(plan: Plan) -> str:
    """config.json of the artifact."""
    return json.dumps(plan.artifact_config, indent=2, ensure_ascii=False) + "\n"
