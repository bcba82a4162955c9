"""To ModelOpt's layout: experts from the artifact under other names, everything else from the native release.

No number is computed but the reciprocals of two scalars for each expert's linear.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4q.checkpoint.shards import PlannedTensor
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.export.job import Export, Made, Parcel, reciprocal_of, require_stored, scalar
from dsv4q.export.plan import native_release, plan_modelopt
from dsv4q.export.together import check_dims, check_pin, check_witnesses, compare_untouched
from dsv4q.foreign.modelopt import COMPRESSED, StoredTensor, modelopt_tensors
from dsv4q.formats.scalars import to_bytes
from dsv4q.layout import Dims
from dsv4q.plan.small_files import write_exported_files

RECIPE = "recipe.yaml"


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
        self.source = native_release(source, self.dims)
        check_dims(artifact, source, self.dims)
        self.stored = {tensor.name: tensor for tensor in modelopt_tensors(self.dims)}
        self._check_experts()
        self.is_pinned = check_pin(made_by, source, artifact)
        size = sum(entry.nbytes for entry in artifact.tensors.values()) / len(artifact.files)
        self.written = plan_modelopt(self.source, self.dims, size, _activations(made_by))
        self.plan, self.whole = self.written.shards, self.written.whole
        check_witnesses(artifact, self.source, self.dims, COMPRESSED)

    def _check_experts(self) -> None:
        """All main experts must be there as NVFP4 with input scales."""
        for stored in (tensor for tensor in self.stored.values() if tensor.twin):
            require_stored(
                self.artifact,
                stored.twin,
                stored.dtype,
                stored.shape or (1,),
                "The artifact's routed experts are not NVFP4 with input scales, and this layout has nothing else",
                "quantize with configs/nvfp4-fp8-mtp.yaml, or another config with NVFP4 weights and inputs",
            )

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

    def summary(self) -> dict[str, Any]:
        """See `Direction.summary`."""
        experts = sum(tensor.name.endswith(".weight_scale_2") for tensor in self.plan.tensors)
        return {**self.written.as_dict(), "quantized_linears": {"experts": experts}}

    def facts(self) -> dict[str, Any]:
        """See `Direction.facts`: what the way back needs, the artifact's own report."""
        return {"is_pinned": self.is_pinned, "draft_inputs": self._draft_inputs(), "origin": self.made_by}

    def _draft_inputs(self) -> dict[str, float]:
        """`block.projection` -> divisor of its inputs, of a draft with NVFP4 experts: one for all, by the bounds."""
        found: dict[str, set[float]] = defaultdict(set)
        for name in self.artifact.tensors:
            if name.startswith("mtp.") and name.endswith(".input_global_scale"):
                block, _, rest = name.partition(".ffn.experts.")
                found[f"{block}.{rest.split('.')[1]}"].add(scalar(self.artifact, name))
        return {key: min(values) for key, values in found.items() if all(len(v) == 1 for v in found.values())}

    def write_small_files(self, report: Mapping[str, Any]) -> None:
        """See `Direction.write_small_files`."""
        texts, recipe = dict(self.written.texts), self.artifact.root / RECIPE
        if recipe.is_file():
            texts[RECIPE] = recipe.read_text(encoding="utf-8")
        write_exported_files(self.job.out, self.source.root, self.plan, texts, report)


def _activations(made_by: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """How the run chose the artifact's input scales, as its report has it; empty if that is not known."""
    try:
        found = (made_by or {})["identity"]["config"]["activations"]
    except (KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
