"""Whether an artifact and a native release belong together: by the pin in report.json, and by bytes.

The pin is the fingerprint of the source that the artifact was made from. An artifact of another tool has none, and one
that was made from a BF16 dequantization has that checkpoint's; then bytes alone tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.journal import first_difference
from dsv4q.checkpoint.native import NativeCheckpoint, entries_of, is_dequantized
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError
from dsv4q.foreign.modelopt import COMPRESSED, expert_tensors, is_main_expert
from dsv4q.formats.compare import tensor_error
from dsv4q.formats.stored import E2M1, NVFP4, StoredForm, decode
from dsv4q.layout import Dims, Shape, TensorSpec, source_tensors

if TYPE_CHECKING:
    from torch import Tensor

WITNESS_BYTES = 1 << 16
"""Untouched tensors up to this size (norms, biases, hyper-connections) are compared before a byte is written."""
PIECE = 16 << 20
"""Bytes of a tensor that are compared at a time."""
WITNESS_ROWS = 128
"""Of an expert: enough to tell it from another, a hundredth of the time that all of it takes."""
FAR = 0.5
"""Relative error from which on a weight is another one: NVFP4 rounds by a tenth, another expert is sqrt(2) away."""

_MODELOPT_NVFP4 = StoredForm(E2M1, (1, 16), "weight_scale", global_scale="weight_scale_2")
_WHAT = "Artifact and source do not belong together"
_HINT = "give the release that the artifact was made from; its report.json says which"


def check_pin(report: Mapping[str, Any] | None, source: Checkpoint, artifact: Checkpoint) -> bool:
    """Hold the source against the fingerprint in the artifact's report; False if it has none of a native source.

    Raises:
        SourceError: the artifact was made from another native checkpoint.
    """
    origin = (report or {}).get("origin") or report or {}
    made_from, identity = origin.get("source"), origin.get("identity")
    pin = identity.get("source") if isinstance(identity, dict) else None
    if not isinstance(pin, dict) or not isinstance(made_from, dict) or made_from.get("layout") != "native":
        return False
    difference = first_difference(pin, source.fingerprint())
    if difference:
        key, before, now = difference
        raise SourceError(
            _WHAT,
            where=f"{artifact.root}/report.json: identity.source.{key}",
            expected=f"{before}, of the source that it was made from",
            found=f"{now}, of {source.root}",
            hint=_HINT,
        )
    return True


def check_dims(artifact: Checkpoint, source: Checkpoint, dims: Dims) -> None:
    """Both config.json must describe the same model; an artifact may have left the draft out.

    Raises:
        SourceError: they do not.
    """
    theirs = replace(Dims.from_config(artifact.config, artifact.config_file), draft=dims.draft)
    for key, found in vars(theirs).items():
        if found != getattr(dims, key):
            expected = f"{getattr(dims, key)}, as in {source.root}"
            raise SourceError(_WHAT, where=f"{artifact.config_file}: {key}", expected=expected, found=found, hint=_HINT)


def check_witnesses(artifact: Checkpoint, source: NativeCheckpoint, dims: Dims, layout: str) -> None:
    """Read what is small of every block, and one expert of each, before a byte is written.

    Raises:
        SourceError: an untouched tensor has other bytes, or a weight is another one.
        WeightError: values that are no numbers.
    """
    for spec in source_tensors(dims):
        if spec.nbytes <= WITNESS_BYTES:
            compare_untouched(artifact, source, spec)
    for spec in _one_of_each_block(dims):
        _compare_expert(artifact, source, spec, layout)


def compare_untouched(artifact: Checkpoint, source: NativeCheckpoint, spec: TensorSpec) -> None:
    """A tensor that the artifact stores as the source does, or as the model has it, must be the source's, bit for bit.

    Raises:
        SourceError: it is not.
    """
    # A draft's routed experts are most of its bytes, and nothing is made of those that an artifact has.
    if spec.expert is not None:
        return
    stored = entries_of(source, spec.name)
    theirs: Checkpoint = source.on_disk
    if all(_alike(artifact, entry.name, entry.dtype, entry.shape) for entry in stored):
        names = [entry.name for entry in stored]
    elif _alike(artifact, spec.name, spec.dtype, spec.shape):
        names, theirs = [spec.name], source
    else:
        return
    for name in names:
        if not _same_bytes(artifact, theirs, name):
            raise SourceError(
                _WHAT,
                where=f"{artifact.root / artifact.tensors[name].file}: {name}",
                expected=f"the bytes of {source.root}{', dequantized' if theirs is source else ''}",
                found="others",
                hint=_HINT,
            )


def _same_bytes(artifact: Checkpoint, theirs: Checkpoint, name: str) -> bool:
    """Whether both have the same bytes of one size; as they lie in the files they are compared a piece at a time."""
    if is_dequantized(theirs, name):
        import torch

        mine, other = (one.tensor(name).flatten().view(torch.uint8) for one in (artifact, theirs))
        return torch.equal(mine, other)
    # Of memoryviews Python compares one byte after the other, of bytearrays all at once. What a last, shorter piece
    # leaves of the one before is equal in both.
    size = artifact.tensors[name].nbytes
    ours, others = bytearray(min(PIECE, size)), bytearray(min(PIECE, size))
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        artifact.read_part(name, start, memoryview(ours)[:length])
        theirs.read_part(name, start, memoryview(others)[:length])
        if ours != others:
            return False
    return True


def _alike(artifact: Checkpoint, name: str, dtype: str, shape: Shape) -> bool:
    entry = artifact.tensors.get(name)
    return entry is not None and (entry.dtype, entry.shape) == (dtype, shape)


def _one_of_each_block(dims: Dims) -> Iterator[TensorSpec]:
    """w2 of one expert in each main block, of another one each time."""
    wanted = {f"layers.{n}.ffn.experts.{n % dims.experts}.w2" for n in range(dims.layers)}
    return (spec for spec in source_tensors(dims) if is_main_expert(spec) and spec.module in wanted)


def _first_rows(tensor: Tensor) -> Tensor:
    return tensor[:WITNESS_ROWS] if tensor.ndim == 2 else tensor


def _compare_expert(artifact: Checkpoint, source: NativeCheckpoint, spec: TensorSpec, layout: str) -> None:
    ours = layout == COMPRESSED
    names = [part.twin if ours else part.name for part in expert_tensors(spec)]
    stored = {name.rpartition(".")[2]: _first_rows(artifact.tensor(name)) for name in names}
    weight = source.decoded(spec.name, [_first_rows(part) for part in source.stored(spec.name)])
    error = tensor_error(weight, decode(NVFP4 if ours else _MODELOPT_NVFP4, stored))
    if not error.relative < FAR:
        raise SourceError(
            _WHAT,
            where=f"{artifact.root}: {spec.module}",
            expected=f"a weight at most {FAR:.0%} from that of {source.root}",
            found=f"one {error.relative:.0%} away",
            hint=_HINT,
        )
