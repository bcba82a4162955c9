"""What a block of a checkpoint is read as: tensors that are stored alike, some at a time, decoded on the device.

They travel as they lie in the files. Reading runs on any thread; decoding is queued by the thread that computes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4q.checkpoint.alike import stored_alike, stored_kind
from dsv4q.checkpoint.native import entries_of
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.evaluation.emulate import kernel_weight
from dsv4q.layout import TensorSpec
from dsv4q.verify.schemes import StoredScheme

TOGETHER = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Bytes on disk that are read and decoded together; one tensor is always allowed."""

Loaded = Mapping[str, tuple[Tensor, ...]]
"""By suffix, what lies on disk of T tensors, on the host: each part [T, ...], two parts where it is native."""


@dataclass(frozen=True, eq=False)
class SideTensor:
    """One tensor of the model, and what it lies on disk as."""

    spec: TensorSpec
    scheme: StoredScheme | None
    """How it is stored; None: as it is, or as in the native release."""
    inputs: StoredScheme | None
    """The scheme by which the kernels round its inputs."""
    names: Mapping[str, str]
    """Suffix -> tensor in the file; one tensor under `weight` or the like if it is not quantized."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Tensors that are stored alike."""

    checkpoint: Checkpoint
    device: torch.device
    tensors: tuple[SideTensor, ...]
    nbytes: int
    """On disk, of them all."""

    def load(self) -> Loaded:
        """What lies on disk, on the host; for a GPU in page-locked memory. Runs on any thread.

        Raises:
            SourceError: as `Checkpoint.tensor`.
        """
        pinned = self.device.type == "cuda"
        return {
            suffix: self.checkpoint.stored_together([tensor.names[suffix] for tensor in self.tensors], pinned=pinned)
            for suffix in self.tensors[0].names
        }

    def decoded(self, loaded: Loaded) -> Tensor:
        """The tensors [T, ...] on the device, linears as the kernels see them.

        Raises:
            SourceError: compressed-tensors cannot decode what is stored.
            WeightError: a native weight that stands for no number.
        """
        there = {
            suffix: [part.to(self.device, non_blocking=True) for part in parts] for suffix, parts in loaded.items()
        }
        scheme = self.tensors[0].scheme
        if scheme is None:
            (parts,) = there.values()
            return self.checkpoint.decoded_together([next(iter(t.names.values())) for t in self.tensors], parts)
        stored = {suffix: part for suffix, (part,) in there.items()}
        if scheme.in_batches:
            return kernel_weight(scheme, stored)
        one_by_one = zip(*(part.unbind() for part in stored.values()), strict=True)
        return torch.stack([kernel_weight(scheme, dict(zip(stored, parts, strict=True))) for parts in one_by_one])


def pieces(checkpoint: Checkpoint, tensors: Iterable[SideTensor], device: torch.device) -> list[Piece]:
    """Tensors that are all there, those that are stored alike together as far as `TOGETHER` allows."""

    def kind(tensor: SideTensor) -> Hashable:
        stored = (stored_kind(checkpoint, name) for name in tensor.names.values())
        return id(tensor.scheme), tuple(tensor.names), *stored

    def nbytes(tensor: SideTensor) -> int:
        return sum(entry.nbytes for name in tensor.names.values() for entry in entries_of(checkpoint, name))

    alike = stored_alike(tensors, kind, nbytes, TOGETHER[device.type])
    return [Piece(checkpoint, device, *one) for one in alike]
