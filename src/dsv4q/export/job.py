"""What is asked for, and what each direction has to say about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dsv4q.checkpoint.output import finished_report, require_finished
from dsv4q.checkpoint.shards import PlannedTensor, ShardPlan
from dsv4q.checkpoint.source import Checkpoint, require_sound, scan
from dsv4q.checkpoint.writer import Data
from dsv4q.config import Config
from dsv4q.errors import SourceError, WeightError
from dsv4q.formats.scalars import from_bytes, reciprocal
from dsv4q.layout import Shape


@dataclass(frozen=True)
class Export:
    """One export as the user asked for it."""

    artifact: Path
    out: Path
    source: Path
    """The native release that the artifact was made from."""
    layout: str
    """`MODELOPT` or `COMPRESSED`."""
    config: Config | None = None
    """What quantize made; None: what the artifact's report.json says."""
    resume: bool = True


@dataclass(frozen=True)
class Parcel:
    """Tensors of one expert, or of one other module, which are made together."""

    tensors: tuple[PlannedTensor, ...]

    @property
    def block(self) -> str:
        return self.tensors[0].block

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class Made:
    """A parcel's bytes."""

    data: list[tuple[str, Data]]
    divisors: dict[str, float] = field(default_factory=dict)
    """Name in compressed-tensors' layout -> a divisor that is not the reciprocal of its own reciprocal."""


class Direction(Protocol):
    """From one layout to the other."""

    @property
    def plan(self) -> ShardPlan:
        """Every shard of OUT."""

    @property
    def whole(self) -> Mapping[str, Path]:
        """Those that are files of the source, as they are."""

    def make(self, parcel: Parcel) -> Made:
        """The bytes of a parcel; runs on any thread.

        Raises:
            SourceError: reading fails, or artifact and source turn out not to belong together.
        """

    def check_whole(self, tensors: Sequence[PlannedTensor]) -> None:
        """The same for tensors that are taken over with their file, of which nothing is made."""

    def check_block(self, block: str, digest: str) -> None:
        """Called when a block is on disk.

        Raises:
            VerificationFailed: it should have been another one.
        """

    def summary(self) -> dict[str, Any]:
        """What OUT consists of, as the report of a run says it of its artifact."""

    def facts(self) -> dict[str, Any]:
        """More for report.json."""

    def write_small_files(self, report: Mapping[str, Any]) -> None:
        """Everything but the shards, the index last."""


def parcels_of(tensors: Sequence[PlannedTensor]) -> Iterator[Parcel]:
    """Tensors of one block in parcels, in the order in which these begin."""
    found: dict[object, list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        expert = tensor.spec.expert
        found[tensor.name.rpartition(".")[0] if expert is None else expert].append(tensor)
    return (Parcel(tuple(members)) for members in found.values())


def open_artifact(path: Path) -> tuple[Checkpoint, dict[str, Any] | None]:
    """A finished artifact's headers, and its report.json if a run of ours wrote one.

    Raises:
        OutputError: the run that makes it has not finished.
        SourceError: absent or damaged.
    """
    require_finished(path, indexed=True)
    checkpoint = require_sound(scan(path), path)
    if not checkpoint.has_weights:
        raise SourceError("The artifact has no safetensors files", where=path, hint="give the folder of an artifact")
    return checkpoint, finished_report(path)


def require_stored(checkpoint: Checkpoint, name: str, dtype: str, shape: Shape, what: str, hint: str) -> None:
    """Refuse a checkpoint that lacks a tensor, or stores it otherwise; a scalar may be of shape [] or [1].

    Raises:
        SourceError: says `what` is wrong and gives the `hint`.
    """
    entry = checkpoint.tensors.get(name)
    if entry is None or (entry.dtype, entry.shape or (1,)) != (dtype, shape or (1,)):
        raise SourceError(
            what,
            where=f"{checkpoint.root}: {name}",
            expected=f"{dtype} {list(shape)}",
            found="no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}",
            hint=hint,
        )


def reciprocal_of(value: float, where: str) -> float:
    """1/x in F32.

    Raises:
        WeightError: it is no positive finite number, or its reciprocal is none.
    """
    inverse = reciprocal(value)
    if inverse is None:
        raise WeightError("A scale has no reciprocal", where=where, expected="a positive finite F32", found=value)
    return inverse


def scalar(checkpoint: Checkpoint, name: str) -> float:
    """A tensor of one F32."""
    return from_bytes(checkpoint.read(name))
