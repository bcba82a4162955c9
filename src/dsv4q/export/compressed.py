"""Back to compressed-tensors' layout, as quantize wrote it: experts from the artifact, the rest from the release.

The recipe is planned again. Attention is encoded again, which gives the same bytes if its scales are the exact ones;
everything else is copied. Each block is held against the digest in the report of the run that made the first artifact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.native import NativeCheckpoint
from dsv4q.checkpoint.shards import PlannedTensor
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.config import Config, config_of
from dsv4q.errors import ConfigError, SourceError, VerificationFailed, command, first_problem
from dsv4q.export.exact import fp8_linear, nvfp4_expert
from dsv4q.export.job import Export, Made, Parcel, reciprocal_of, require_stored, scalar
from dsv4q.export.modelopt import RECIPE
from dsv4q.export.plan import native_release
from dsv4q.export.together import check_dims, check_pin, check_witnesses, compare_untouched
from dsv4q.foreign.modelopt import COMPRESSED, MODELOPT, StoredTensor, expert_tensors, is_main_expert
from dsv4q.formats.scalars import to_bytes
from dsv4q.layout import Dims, source_tensors
from dsv4q.plan.plan import make_plan
from dsv4q.plan.small_files import write_small_files
from dsv4q.recipe.schemes import FLOAT, NVFP4

_EXACT = {True: (FLOAT, "exact_fp8_block"), False: (NVFP4, "exact_nvfp4")}
"""Format and observer whose bytes can be made again: of other linears, and of routed experts."""


class ToCompressed:
    """See `job.Direction`.

    Raises:
        SourceError, ConfigError: what makes it impossible; nothing has been written then.
    """

    def __init__(
        self, job: Export, artifact: Checkpoint, source: Checkpoint, made_by: Mapping[str, Any] | None
    ) -> None:
        self.job, self.artifact = job, artifact
        self.dims = Dims.from_config(source.config, source.config_file)
        self.source: NativeCheckpoint = native_release(source, self.dims)
        report = made_by or {}
        self.origin: Mapping[str, Any] = report.get("origin") or {}
        self.config = job.config or self._config()
        check_dims(artifact, source, self.dims)
        self.experts = self._experts()
        self.divisors: dict[str, float] = {}
        for block in report.get("blocks", []):
            self.divisors |= block.get("divisors", {})
        self.draft_inputs: Mapping[str, float] = report.get("draft_inputs") or {}
        blocks = [] if job.config else self.origin.get("blocks", [])
        self.digests = {block["block"]: block["digest"] for block in blocks}
        self.is_pinned = check_pin(made_by, source, artifact)
        self.plan = make_plan(source, self.config)
        if self.plan.problems:
            raise first_problem(self.plan.problems, f"`{command('dsv4q', 'plan', job.source)}` lists them all")
        self.whole: dict[str, Path] = {}
        self._check_scales()
        check_witnesses(artifact, self.source, self.dims, MODELOPT)

    def _config(self) -> Config:
        """What the run was asked to make that the artifact comes from."""
        try:
            canonical = dict(self.origin["identity"]["config"])
            if canonical.get("calibration"):  # an identity knows data by its digest, not by its name
                named = {"dataset": self.origin["calibration"]["dataset"]}
                canonical["calibration"] = {**canonical["calibration"], **named}
            return config_of(canonical, f"{self.artifact.root}/report.json")
        except KeyError:
            raise ConfigError(
                "The artifact's report.json does not say what was made",
                where=self.artifact.root,
                expected="the report of dsv4q export, with that of the run in it",
                found="another one, or none",
                hint="say it with --config, such as configs/nvfp4-fp8-mtp.yaml",
            ) from None

    def _experts(self) -> dict[str, StoredTensor]:
        """Name in compressed-tensors' layout -> tensor of the artifact, of all main experts."""
        found = {}
        for spec in (spec for spec in source_tensors(self.dims) if is_main_expert(spec)):
            for stored in expert_tensors(spec):
                require_stored(
                    self.artifact,
                    stored.name,
                    stored.dtype,
                    stored.shape,
                    "The artifact is not one in ModelOpt's layout with NVFP4 experts in every main layer",
                    f"`dsv4q verify-shards {self.artifact.root}` lists all that is missing",
                )
                found[stored.twin] = stored
        return found

    # ------------------------------------------------------------------------------------------------ exact or not

    def _check_scales(self) -> None:
        """Attention can be made again, and every multiplier has its divisor.

        Raises:
            SourceError: the recipe's attention has other scales than the exact ones; a scale's divisor is lost.
        """
        for tensor in (tensor for tensor in self.plan.tensors if tensor.encoded):
            group = self.plan.group_of[tensor.spec.module]
            scheme = self.config.groups[group]
            wanted = _EXACT[tensor.spec.expert is None]
            found = scheme.compression_format, scheme.weights.observer or "memoryless_minmax"
            if found[0] != wanted[0] or (found[1] != wanted[1] and not is_main_expert(tensor.spec)):
                expected = "{} with weights by {}".format(*wanted)
                self._cannot(f"config_groups.{group} ({tensor.spec.module})", expected, "{} by {}".format(*found))
            if tensor.spec.is_mtp and tensor.spec.expert is not None and not self.draft_inputs:
                expected = "the draft's input scales in report.json, one for each projection of a block"
                self._cannot(tensor.name, expected, "none, and nothing else has them")
        if self.digests:  # the run of ours that wrote them has noted what the reciprocals do not tell
            return
        for twin in (twin for twin in self.experts if twin.endswith(".weight_global_scale")):
            multiplier = scalar(self.artifact, self.experts[twin].name)
            if math.frexp(multiplier)[0] != 0.5:
                self._cannot(self.experts[twin].name, "a power of two, whose reciprocal is exact", repr(multiplier))

    def _cannot(self, where: str, expected: str, found: str) -> None:
        raise SourceError(
            "The way back needs exact scales, and this artifact has others",
            where=f"{self.artifact.root}: {where}",
            expected=expected,
            found=found,
            hint="quantize the release with that config; the way back is for what exact observers made",
        )

    # ------------------------------------------------------------------------------------------------ bytes

    def make(self, parcel: Parcel) -> Made:
        """See `Direction.make`."""
        made = Made([])
        encoded: dict[str, bytes] = {}
        for tensor in parcel.tensors:
            if not tensor.encoded:
                compare_untouched(self.artifact, self.source, tensor.spec)
                made.data.append((tensor.name, self.source.read(tensor.spec.name)))
            elif is_main_expert(tensor.spec):
                made.data.append((tensor.name, self._expert_part(tensor)))
            else:
                encoded = encoded or self._encoded(parcel)
                made.data.append((tensor.name, encoded[tensor.name]))
        return made

    def _encoded(self, parcel: Parcel) -> dict[str, bytes]:
        """The tensors of a linear of attention, or of the draft, or of an expert of the draft, by name."""
        specs = list(dict.fromkeys(tensor.spec for tensor in parcel.tensors))
        if specs[0].expert is not None:
            projections = ("w1", "w2", "w3")
            return nvfp4_expert(self.source, specs, {p: self.draft_inputs[f"{parcel.block}.{p}"] for p in projections})
        (spec,) = specs
        compare_untouched(self.artifact, self.source, spec)
        scale = next(tensor for tensor in parcel.tensors if tensor.name.endswith(".weight_scale"))
        return fp8_linear(self.source, spec, scale.dtype)

    def _expert_part(self, tensor: PlannedTensor) -> memoryview | bytes:
        stored = self.experts[tensor.name]
        if not stored.inverse:
            return self.artifact.read(stored.name)
        multiplier = scalar(self.artifact, stored.name)
        divisor = self.divisors.get(tensor.name)
        if divisor is None or reciprocal_of(divisor, tensor.name) != multiplier:
            divisor = reciprocal_of(multiplier, stored.name)
        return to_bytes(divisor)

    def check_whole(self, tensors: Sequence[PlannedTensor]) -> None:
        """See `Direction.check_whole`: there are none."""

    def check_block(self, block: str, digest: str) -> None:
        """See `Direction.check_block`."""
        wanted = self.digests.get(block)
        if wanted not in (None, digest):
            raise VerificationFailed(
                "The way back does not lead to what quantize wrote",
                where=f"{self.job.out}: {block}",
                expected=f"tensors with the digest {wanted}, as in report.json",
                found=digest,
                hint=f"see `dsv4q verify-shards {self.artifact.root} --deep --source {self.source.root}`",
            )

    # ------------------------------------------------------------------------------------------------ files

    def summary(self) -> dict[str, Any]:
        """See `Direction.summary`."""
        found: dict[str, Any] = self.plan.as_dict()["artifact"]
        return {"layout": COMPRESSED, **found}

    def facts(self) -> dict[str, Any]:
        """See `Direction.facts`: the report of the run that made the first artifact, if it is known."""
        return {"is_pinned": self.is_pinned, "proven": bool(self.digests), "origin": self.origin or None}

    def write_small_files(self, report: Mapping[str, Any]) -> None:
        """See `Direction.write_small_files`: by the code that writes them for quantize."""
        recipe = self.artifact.root / RECIPE
        text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
        write_small_files(self.job.out, self.source.root, self.plan, report, text)
