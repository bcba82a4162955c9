"""What an export to ModelOpt's layout would write, from headers, or from a config.json alone.

Files of the release that hold no routed expert of a main layer stay as they are; the rest is cut into balanced shards
of about the artifact's size. `dsv4q plan --layout modelopt` shows it before there is an artifact.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.against_layout import compare_with_layout
from dsv4q.checkpoint.native import NativeCheckpoint
from dsv4q.checkpoint.shards import (
    PlannedShard,
    PlannedTensor,
    ShardPlan,
    balanced_shards,
    block_order,
    blocks_of,
    shard_name,
)
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.console import Console, human_bytes
from dsv4q.engines.facts import Facts
from dsv4q.errors import ConfigError, Dsv4qError, SourceError, UsageError, command, first_problem
from dsv4q.export.card import export_facts, modelopt_card
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT, hf_quant_config, modelopt_config, modelopt_tensors
from dsv4q.layout import Dims
from dsv4q.plan.plan import Plan


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export puts into OUT, but for the bytes of tensors."""

    shards: ShardPlan
    whole: Mapping[str, Path]
    """Shards that are files of the source -> that file."""
    texts: Mapping[str, str]
    """Small files that are not the source's."""
    facts: Facts
    """What decides which engines load it."""

    def as_dict(self) -> dict[str, Any]:
        """For report.json and `--json`."""
        plan = self.shards
        mtp = [tensor for tensor in plan.tensors if tensor.spec.is_mtp]
        classes: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
        for tensor in plan.tensors:
            found = classes[tensor.spec.class_name]
            found["tensors"] += 1
            found["bytes"] += tensor.nbytes
        return {
            "layout": MODELOPT,
            "tensors": len(plan.tensors),
            "bytes": plan.artifact_bytes,
            "classes": dict(sorted(classes.items(), key=lambda item: -item[1]["bytes"])),
            "mtp_tensors": len(mtp),
            "mtp_bytes": sum(tensor.nbytes for tensor in mtp),
            "shards": [
                {"file": s.file, "tensors": len(s.tensors), "bytes": self._size(s), "blocks": blocks_of(s)}
                for s in plan.shards
            ],
            "files_of_the_source": {file: path.name for file, path in self.whole.items()},
        }

    def show(self, console: Console) -> None:
        """The same for people."""
        facts, whole = self.as_dict(), len(self.whole)
        mtp = f"{facts['mtp_tensors']:,} mtp.* tensors ({human_bytes(facts['mtp_bytes'])})"
        shards = f"{len(facts['shards'])} shards, {whole} of them files of the source"
        console.print(f"exported   {facts['tensors']:,} tensors, {human_bytes(facts['bytes'])}, in {shards}; {mtp}")

    def _size(self, shard: PlannedShard) -> int:
        """Of a shard's file; one that is the source's has the source's header."""
        path = self.whole.get(shard.file)
        return shard.nbytes if path is None else path.stat().st_size


def check_layout(layout: str) -> bool:
    """Whether the layout of this name is ModelOpt's.

    Raises:
        UsageError: there is none.
    """
    if layout not in (MODELOPT, COMPRESSED):
        expected = f"{MODELOPT} or {COMPRESSED}"
        raise UsageError("There is no such layout", where="--layout", expected=expected, found=layout)
    return layout == MODELOPT


def plan_modelopt(source: Checkpoint, dims: Dims, size: float, activations: Mapping[str, Any]) -> ExportPlan:
    """What is written in ModelOpt's layout.

    Args:
        source: the native release, or a config.json alone.
        size: bytes of a shard, about.
        activations: that section of the config that the artifact was made with, if it is known.

    Raises:
        SourceError: config.json is not that of a native release.
    """
    config = modelopt_config(source.config, dims, str(source.config_file))
    stored = {tensor.name: tensor for tensor in modelopt_tensors(dims)}
    planned = [PlannedTensor(t.name, t.dtype, t.shape, t.spec, bool(t.twin), t.spec.block) for t in stored.values()]
    inside: dict[str, set[str]] = defaultdict(set)
    for name, entry in (source.on_disk.tensors if isinstance(source, NativeCheckpoint) else {}).items():
        inside[entry.file].add(name)
    staying = {name for name, tensor in stored.items() if not tensor.twin}
    kept = {file: names for file, names in inside.items() if names <= staying}
    taken: set[str] = set().union(*kept.values())
    rest = [tensor for tensor in planned if tensor.name not in taken]
    count = max(1, round(sum(tensor.nbytes for tensor in rest) / size))
    made: list[tuple[PlannedShard, Path | None]] = [(s, None) for s in balanced_shards(rest, count, "shards")]
    for file, names in kept.items():
        made.append((PlannedShard.of(file, [t for t in planned if t.name in names]), source.root / file))
    made.sort(key=lambda pair: min(block_order(tensor.block) for tensor in pair[0].tensors))
    shards, whole = [], {}
    for number, (shard, path) in enumerate(made, 1):
        shards.append(replace(shard, file=shard_name(number, len(made))))
        if path is not None:
            whole[shards[-1].file] = path
    plan = ShardPlan(tuple(shards))
    facts = export_facts(plan, config)
    texts = {
        "config.json": _json(config),
        "hf_quant_config.json": _json(hf_quant_config(dims)),
        "README.md": modelopt_card(plan, source.root, facts, activations),
    }
    return ExportPlan(plan, whole, texts, facts)


def plan_export(source: Checkpoint, made: Plan) -> ExportPlan:
    """What an export of the artifact that `made` plans would write.

    Raises:
        SourceError, ConfigError: why there can be none.
    """
    if source.has_weights:
        native_release(source, made.dims)
    there = {tensor.name: (tensor.dtype, tensor.shape) for tensor in made.tensors}
    for tensor in (tensor for tensor in modelopt_tensors(made.dims) if tensor.twin):
        if there.get(tensor.twin) != (tensor.dtype, tensor.shape or (1,)):
            raise ConfigError(
                "The config makes no NVFP4 experts with input scales, and ModelOpt's layout has nothing else",
                where="--layout modelopt",
                expected=f"{tensor.twin} {tensor.dtype} {list(tensor.shape or (1,))}",
                found=there.get(tensor.twin, "no such tensor"),
                hint="take nvfp4-fp8-mtp, or another config with NVFP4 weights and inputs",
            )
    return plan_modelopt(source, made.dims, made.artifact_bytes / len(made.shards), vars(made.config.activations))


def native_release(source: Checkpoint, dims: Dims) -> NativeCheckpoint:
    """The source, if all of it is as a native release with MXFP4 experts has it.

    Raises:
        SourceError: it is damaged, BF16, or stored otherwise.
    """
    problems: list[Dsv4qError] = [*source.problems, *compare_with_layout(source, dims)]
    if problems:
        raise first_problem(tuple(problems), f"`{command('dsv4q', 'plan', source.root)}` lists them all")
    if not isinstance(source, NativeCheckpoint):
        raise SourceError(
            "The source is BF16, and this layout keeps all but the experts as the native release has it",
            where=source.root,
            expected="DeepSeek's own FP8 and MXFP4 weights with their scales",
            found="BF16 weights, which would have to be rounded to FP8 again",
            hint="give the official release; an artifact made from its BF16 dequantization has the same experts",
        )
    there = source.on_disk.tensors
    for stored in (tensor for tensor in modelopt_tensors(dims) if not tensor.twin):
        entry = there.get(stored.name)
        if entry is None or (entry.dtype, entry.shape) != (stored.dtype, stored.shape):
            raise SourceError(
                "The source stores a tensor otherwise than the releases that this layout is for",
                where=f"{source.root / (entry.file if entry else '')}: {stored.name}",
                expected=f"{stored.dtype} {list(stored.shape)}",
                found="no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}",
                hint="vLLM would cast or skip it in silence; give a release with MXFP4 experts and E8M0 scales",
            )
    return source


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
