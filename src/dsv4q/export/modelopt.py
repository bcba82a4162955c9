"""To ModelOpt's layout: experts from the artifact under other names, everything else from the native release.

No number is computed but the reciprocals of two scalars for each expert's linear.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.against_layout import compare_with_layout
from dsv4q.checkpoint.native import NativeCheckpoint
from dsv4q.checkpoint.shards import PlannedShard, PlannedTensor, ShardPlan, balanced_shards, block_order, shard_name
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import Dsv4qError, SourceError, first_problem
from dsv4q.export.card import modelopt_card
from dsv4q.export.job import Export, Made, Parcel, reciprocal_of, scalar
from dsv4q.export.together import check_dims, check_pin, check_witnesses, compare_untouched
from dsv4q.foreign.modelopt import (
    COMPRESSED,
    StoredTensor,
    hf_quant_config,
    modelopt_config,
    modelopt_tensors,
)
from dsv4q.formats.scalars import to_bytes
from dsv4q.layout import Dims
from dsv4q.plan.small_files import write_exported_files

RECIPE = "recipe.yaml"


def open_native(job: Export, source: Checkpoint, dims: Dims) -> NativeCheckpoint:
    """The source, if all of it is as a native release with MXFP4 experts has it.

    Raises:
        SourceError: it is damaged, BF16, or stored otherwise.
    """
    problems: list[Dsv4qError] = [*source.problems, *compare_with_layout(source, dims)]
    if problems:
        raise first_problem(tuple(problems), f"`dsv4q plan {job.source}` lists them all")
    if not isinstance(source, NativeCheckpoint):
        raise SourceError(
            "The source is BF16, and this layout keeps all but the experts as the native release has it",
            where=job.source,
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


class ToModelOpt:
    """See `job.Direction`.

    Raises:
        SourceError: what makes it impossible; nothing has been written then.
    """

    def __init__(
        self, job: Export, artifact: Checkpoint, source: Checkpoint, made_by: Mapping[str, Any] | None
    ) -> None:
        self.job, self.artifact, self.made_by = job, artifact, made_by
        self.dims = Dims.from_config(source.config, source.config_file)
        self.source = open_native(job, source, self.dims)
        self.config = modelopt_config(source.config, self.dims, str(source.config_file))
        check_dims(artifact, source, self.dims)
        self.stored = {tensor.name: tensor for tensor in modelopt_tensors(self.dims)}
        self._check_experts()
        self.is_pinned = check_pin(made_by, source, artifact)
        check_witnesses(artifact, self.source, self.dims, COMPRESSED)
        self.plan, self.whole = self._shards()

    def _check_experts(self) -> None:
        """All main experts must be there as NVFP4 with input scales."""
        for stored in (tensor for tensor in self.stored.values() if tensor.twin):
            entry = self.artifact.tensors.get(stored.twin)
            if entry is None or (entry.dtype, entry.shape or (1,)) != (stored.dtype, stored.shape or (1,)):
                raise SourceError(
                    "The artifact's routed experts are not NVFP4 with input scales, and this layout has nothing else",
                    where=f"{self.artifact.root}: {stored.twin}",
                    expected=f"{stored.dtype} {list(stored.shape or (1,))}",
                    found="no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}",
                    hint="quantize with configs/nvfp4-fp8-mtp.yaml, or another config with NVFP4 weights and inputs",
                )

    def _shards(self) -> tuple[ShardPlan, dict[str, Path]]:
        """Files of the source without a main expert stay as they are; the rest is balanced, at the artifact's size."""
        planned = {t.name: PlannedTensor(t.name, t.dtype, t.shape, t.spec, bool(t.twin), t.spec.block)
                   for t in self.stored.values()}  # fmt: skip
        inside: dict[str, list[str]] = defaultdict(list)
        for name, entry in self.source.on_disk.tensors.items():
            inside[entry.file].append(name)
        kept = {file: set(names) for file, names in inside.items() if all(self._is_kept(name) for name in names)}
        taken = set().union(*kept.values())
        rest = [tensor for name, tensor in planned.items() if name not in taken]
        size = sum(entry.nbytes for entry in self.artifact.tensors.values()) / len(self.artifact.files)
        shards = [*balanced_shards(rest, max(1, round(sum(t.nbytes for t in rest) / size)), "shards of the artifact")]
        origin: dict[PlannedShard, str] = {}
        for file, names in kept.items():
            shard = PlannedShard.of(file, [tensor for name, tensor in planned.items() if name in names])
            origin[shard] = file
        order = sorted([*shards, *origin], key=lambda s: min(block_order(t.block) for t in s.tensors))
        named, whole = [], {}
        for number, shard in enumerate(order, 1):
            named.append(replace(shard, file=shard_name(number, len(order))))
            if shard in origin:
                whole[named[-1].file] = self.source.root / origin[shard]
        return ShardPlan(tuple(named)), whole

    def _is_kept(self, name: str) -> bool:
        stored = self.stored.get(name)
        return stored is not None and not stored.twin

    # ------------------------------------------------------------------------------------------------ bytes

    def make(self, parcel: Parcel) -> Made:
        """See `Direction.make`."""
        made = Made([])
        for tensor in parcel.tensors:
            stored = self.stored[tensor.name]
            if stored.twin:
                made.data.append((tensor.name, self._expert_part(stored, made)))
                continue
            made.data.append((tensor.name, self.source.on_disk.read(tensor.name)))
            if tensor.name == tensor.spec.name:
                compare_untouched(self.artifact, self.source, tensor.spec)
        return made

    def _expert_part(self, stored: StoredTensor, made: Made) -> memoryview | bytes:
        if not stored.inverse:
            return self.artifact.read(stored.twin)
        divisor = scalar(self.artifact, stored.twin)
        multiplier = reciprocal_of(divisor, stored.twin)
        if reciprocal_of(multiplier, stored.twin) != divisor:
            made.divisors[stored.twin] = divisor
        return to_bytes(multiplier)

    def check_whole(self, tensors: Sequence[PlannedTensor]) -> None:
        """See `Direction.check_whole`."""
        for tensor in tensors:
            if tensor.name == tensor.spec.name:
                compare_untouched(self.artifact, self.source, tensor.spec)

    def check_block(self, block: str, digest: str) -> None:
        """See `Direction.check_block`: nothing to hold it against."""

    # ------------------------------------------------------------------------------------------------ files

    def facts(self) -> dict[str, Any]:
        """What the way back needs: the artifact's own report."""
        files = {file: path.name for file, path in self.whole.items()}
        return {"files_of_the_source": files, "is_pinned": self.is_pinned, "origin": self.made_by}

    def write_small_files(self, report: Mapping[str, Any]) -> None:
        """See `Direction.write_small_files`."""
        texts = {
            "config.json": _json(self.config),
            "hf_quant_config.json": _json(hf_quant_config(self.dims)),
            "README.md": modelopt_card(self.plan, self.dims, self.source.root),
        }
        recipe = self.artifact.root / RECIPE
        if recipe.is_file():
            texts[RECIPE] = recipe.read_text(encoding="utf-8")
        write_exported_files(self.job.out, self.source.root, self.plan, texts, report)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
