"""What a judgement goes by: what must be there, and what it is held against."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from dsv4q.checkpoint.source import Checkpoint
from dsv4q.layout import Dims, Shape, TensorSpec, head_copies, source_tensors
from dsv4q.verify.config import judge_config
from dsv4q.verify.files import Header, Headers
from dsv4q.verify.result import ClassErrors, Log
from dsv4q.verify.schemes import StoredScheme

if TYPE_CHECKING:
    import torch

COMPRESSED = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
"""Endings of names that only an artifact has."""
FLOATS = ("BF16", "F16", "F32", "F64")
BATCH_BYTES = 1 << 28
"""Decoded F32 values of linears that are judged together, at most; one linear is always allowed."""
PACKED_BATCH_BYTES = 1 << 27
"""Of linears whose codes are compared with codes: what is read of them, at most. The device needs twice that."""
DEVICE_BYTES = 8 * BATCH_BYTES
"""What that takes on the device at most: a batch as stored, decoded and as its source, and the source's pools."""


@dataclass(frozen=True)
class Contract:
    """What an artifact must be, by its config.json alone."""

    config: Mapping[str, Any]
    dims: Dims
    plain: bool
    """Nothing is quantized, and nothing is meant to be."""
    specs: Mapping[str, TensorSpec]
    """The model's tensors by name."""
    schemes: Mapping[str, StoredScheme]
    """How each quantized linear is stored, by module."""
    copies: Mapping[str, str]
    """Copies of the shared head under every MTP layer -> the main tensor that each copies."""
    tensors: Mapping[str, tuple[tuple[str, ...], Shape]]
    """Every tensor that has to be there -> dtypes allowed, shape; of the copies all or none."""

    @classmethod
    def of(cls, config: Mapping[str, Any], dims: Dims, log: Log, *, plain: bool = False) -> Contract:
        """Check quantization_config, and derive from it and the layout what must be there."""
        specs = source_tensors(dims)
        schemes = {} if plain else judge_config(config, dims, specs, log)
        tensors: dict[str, tuple[tuple[str, ...], Shape]] = {}
        for spec in specs:
            scheme = schemes.get(spec.module)
            if scheme is None:
                tensors[spec.name] = ((spec.dtype,), spec.shape)
                continue
            for suffix, stored in scheme.stored(spec.shape).items():
                tensors[f"{spec.module}.{suffix}"] = stored
        copies = {} if plain else head_copies(dims)
        tensors |= {copy: tensors[main] for copy, main in copies.items()}
        return cls(config, dims, plain, {spec.name: spec for spec in specs}, schemes, copies, tensors)

    def whole_linears(self, names: Iterable[str]) -> Iterator[tuple[TensorSpec, StoredScheme]]:
        """Quantized linears all of whose tensors are among `names`, in the order in which these come."""
        here = dict.fromkeys(names)
        for module in dict.fromkeys(name.rpartition(".")[0] for name in here):
            scheme, spec = self.schemes.get(module), self.specs.get(f"{module}.weight")
            if scheme is None or spec is None:
                continue
            if all(f"{module}.{suffix}" in here for suffix in scheme.stored(spec.shape)):
                yield spec, scheme

    @property
    def as_stored(self) -> bool:
        """Whether the judge sees names and bytes as they lie in the files."""
        return True

    @property
    def reader(self) -> type[Checkpoint]:
        """Brings the bytes of the artifact as the judge sees them."""
        return Checkpoint

    def shown(self, headers: Headers, log: Log) -> Headers:
        """The headers as the judge sees them."""
        return headers

    def seen(self, source: Checkpoint) -> Checkpoint:
        """The source as the judge sees it.

        Raises:
            SourceError: it is not of the kind that all must be equal to.
        """
        return source

    def finish(self, case: Case) -> None:
        """What is left to say when everything has been seen."""

    def text(self, name: str) -> str:
        """Dtypes and shape that a tensor must have."""
        dtypes, shape = self.tensors[name]
        return f"{' or '.join(dtypes)} {list(shape)}"

    def instead(self, name: str) -> str:
        """What should be there instead of a tensor that should not."""
        module, _, suffix = name.rpartition(".")
        tensors, modules = self._transformers_names
        if name in tensors:
            return f"{tensors[name]}: this is transformers' name of it"
        if module in modules:
            return f"{modules[module]}.{suffix}: this is transformers' name of it"
        if name.startswith("mtp.") and not self.dims.draft.stages:
            return "no mtp.* tensor: config.json has no draft"
        if re.fullmatch(r"mtp\.\d+\.embed\.weight", name):
            right = name.replace("embed", "emb.tok_emb")
            return f"no such name (it breaks the consumer's loader); the copy is {right}"
        if name.endswith((".weight_scale_inv", ".scale")):
            return f"no such name; a scale is called {module}.weight_scale"
        return "no such tensor"

    @cached_property
    def _transformers_names(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of tensors and of modules -> ours."""
        specs = [spec for spec in self.specs.values() if spec.hf_name != spec.name]
        return {s.hf_name: s.name for s in specs}, {s.hf_name.rpartition(".")[0]: s.module for s in specs}


@dataclass(frozen=True)
class Case:
    """An artifact, what it is held against, and what has been found out."""

    contract: Contract
    artifact: Checkpoint
    """Its sound tensors, as far as they are known."""
    source: Checkpoint | None
    deep: bool
    log: Log
    device: torch.device | None = None
    """Where quantized weights are judged; None: no value is looked at."""
    promised: frozenset[str] = frozenset()
    """Linears that are exact wherever the source allows it, as the artifact's own recipe says."""
    hashed: bool = False
    """Take the SHA-256 of every tensor that is read."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of those tensors."""
    sound: dict[str, Header] = field(default_factory=dict)
    """Tensors that must be there and are, once, with the right dtype and shape."""
    errors: dict[str, ClassErrors] = field(default_factory=lambda: defaultdict(ClassErrors))
    """By role of linears."""
    exact: Counter[str] = field(default_factory=Counter)
    """Linears by role that were seen to be their source bit for bit and are not in `errors`."""
    rounded: set[str] = field(default_factory=set)
    """Groups of which a whole batch was not exact; their other linears are judged one by one at once."""

    def apart(self) -> Case:
        """The same case with nothing found out yet: for another thread."""
        return replace(self, log=Log(), errors=defaultdict(ClassErrors))

    def take(self, other: Case) -> None:
        """Add what has been found out apart."""
        self.log.differences += other.log.differences
        self.log.checks.update(other.log.checks)
        for role, errors in other.errors.items():
            self.errors[role].merge(errors)

    def differs(self, check: str, name: str, expected: str, found: str) -> None:
        """Log a difference of one tensor."""
        file = self.sound[name].file if name in self.sound else None
        self.log.differs(check, tensor=name, file=file, expected=expected, found=found)

    def is_lost(self, name: str) -> bool:
        """Whether a tensor of the source is damaged; its shard has been named, and it is not compared."""
        assert self.source is not None
        return name in self.source.unread or (name in self.source.tensors and not self.source.is_whole(name))

    def source_fault(self, spec: TensorSpec) -> str | None:
        """Why the source's weight cannot be compared; None if it can."""
        assert self.source is not None
        entry = self.source.tensors.get(spec.name)
        if entry is None:
            return "no such tensor"
        return None if entry.dtype in FLOATS and entry.shape == spec.shape else f"{entry.dtype} {[*entry.shape]}"


class ValueCheck(Protocol):
    """A piece of the value checks: `load` runs on any thread, `judge` afterwards on the judge's, in order."""

    label: str
    """What the progress bar says meanwhile."""
    size: int
    """Bytes of the artifact that it deals with."""
    read: int
    """Bytes that it reads, of the artifact and of the source as it lies on disk."""
    memory: int
    """Bytes that it holds between the begin of `load` and the end of `judge`."""

    def load(self) -> None:
        """Read, and judge what the host judges."""

    def judge(self) -> None:
        """Say what is wrong."""
