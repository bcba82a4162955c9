"""The judge of an artifact whose shards come one at a time and go again: `dsv4q rehearse`.

It asks what `verify` asks with a source, of each shard by itself: which tensors must be there follows from config.json
alone, untouched ones are the source's byte for byte, quantized ones decode to it. It shares no code with planner and
writer. What is exact is seen in batches, on the device, where the source's weights are made too; whatever is not
exact goes to the linear's own judge of `weights.py`, which tells a defect from what a recipe rounds.

Memory: `ahead.BUDGET` on the host; on the device about `DEVICE_BYTES`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4q.checkpoint.headers import Findings, TensorEntry, read_shard
from dsv4q.checkpoint.pipes import loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.formats.encode import fp8_block_decode, nvfp4_decode
from dsv4q.layout import HEAD_COPIES, Dims, Shape, TensorSpec, source_tensors
from dsv4q.made_up.generated import GeneratedCheckpoint
from dsv4q.verify.case import Case, Job
from dsv4q.verify.config import FP8, NVFP4, Scheme, judge_config
from dsv4q.verify.files import Header
from dsv4q.verify.judge import Survey
from dsv4q.verify.result import ErrorStats, Log
from dsv4q.verify.untouched import PIECE, Piece, Untouched
from dsv4q.verify.weights import Linear

BATCH_BYTES = 1 << 28
"""Decoded F32 values of a batch, at most; one linear is always allowed."""
DEVICE_BYTES = 8 * BATCH_BYTES
"""What judging takes on the device at most: a batch as stored, decoded and as its source, and the pools."""

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
_PAIRED = ("weight_global_scale", "input_global_scale")


class ShardJudge:
    """Judges the shards of one artifact as they become whole, each once, in any order.

    Args:
        root: folder in which the shards lie.
        config: the artifact's config.json.
        source: what the artifact is made of.
        device: where quantized weights are compared.
    """

    def __init__(
        self, root: Path, config: Mapping[str, Any], source: GeneratedCheckpoint, device: torch.device
    ) -> None:
        self.root, self.config, self.source, self.device = root, config, source, device
        self.log = Log()
        self.dims = Dims.from_config(config, root / "config.json")
        specs = source_tensors(self.dims)
        self.specs = {spec.name: spec for spec in specs}
        self.schemes = judge_config(config, self.dims, specs, self.log)
        self.copies = {f"mtp.{i}.{s}": main for i in range(self.dims.mtp_layers) for s, main in HEAD_COPIES.items()}
        self.owed = self._expected(specs)
        self.split = set(self.schemes)
        """Quantized linears that no shard so far held as a whole."""
        self.exact: Counter[str] = Counter()
        """Linears by role that decode to the source bit for bit."""
        self.errors: dict[str, ErrorStats] = defaultdict(ErrorStats)
        """Linears by role that do not."""
        self.tensors, self.mtp_tensors, self.nbytes, self.shards = 0, 0, 0, 0
        self._stream: AbstractContextManager[object] = nullcontext()
        if device.type == "cuda":  # or its work would wait for the run's, and the run's for it
            self._stream = torch.cuda.stream(torch.cuda.Stream(device))

    def _expected(self, specs: list[TensorSpec]) -> dict[str, tuple[tuple[str, ...], Shape]]:
        """Every tensor that may come -> dtypes allowed, shape."""
        expected: dict[str, tuple[tuple[str, ...], Shape]] = {}
        for spec in specs:
            scheme = self.schemes.get(spec.module) if spec.is_quantizable else None
            stored = {spec.name.rpartition(".")[2]: ((spec.dtype,), spec.shape)}
            for suffix, kind in (stored if scheme is None else scheme.stored(spec.shape)).items():
                expected[f"{spec.module}.{suffix}" if spec.module else suffix] = kind
        return expected | {copy: expected[main] for copy, main in self.copies.items()}

    def judge(self, file: str, check_stop: Callable[[], None]) -> None:
        """Look at one whole shard; what is wrong goes into `log`.

        Args:
            check_stop: called between two pieces of work; what it raises ends the judging.

        Raises:
            SourceError: reading fails.
        """
        findings = Findings(self.root)
        shard = read_shard(file, None, findings)
        self.shards += 1
        self.log.looked_at("headers")
        for problem in findings.errors():
            self.log.differs("headers", file=file, expected=problem.expected or "a sound header", found=problem.what)
        if shard is None:
            return
        looked_at = {name: self._sound(entry, shard.size) for name, entry in shard.entries.items()}
        sound = {name: header for name, header in looked_at.items() if header is not None}
        survey = Survey(self.root, self.config, self.dims, self.specs, False, self.schemes, self.copies, sound)
        config_file = self.root / "config.json"
        entries, size = shard.entries, {file: shard.size}
        with Checkpoint(self.root, dict(self.config), entries, size, (), True, config_file) as artifact, self._stream:
            case = Case(survey, artifact, self.source, True, self.device, self.log)
            found = _Found(case, self.exact, self.errors)
            self.split -= {spec.module for spec, _ in found.linears()}
            with loaded_ahead(found.jobs(), lambda job: job.load(), lambda job: job.memory) as jobs:
                for job, _ in jobs:
                    check_stop()
                    job.judge()
            found.check_pairs()

    def _sound(self, entry: TensorEntry, size: int) -> Header | None:
        """What the header says of a tensor, if that is as it must be and the file, of `size` bytes, has it all."""
        check = "mtp" if entry.name.startswith("mtp.") else "tensors"
        self.log.looked_at(check)
        self.tensors, self.nbytes = self.tensors + 1, self.nbytes + entry.nbytes
        self.mtp_tensors += check == "mtp"
        wanted = self.owed.pop(entry.name, None)
        header = Header(entry.file, entry.dtype, entry.shape, entry.start, entry.nbytes, True)
        if wanted is not None and entry.dtype in wanted[0] and entry.shape == wanted[1]:
            return header if entry.start + entry.nbytes <= size else None  # that it has not is a problem of the header
        expected = "no such tensor, or only once" if wanted is None else f"{' or '.join(wanted[0])} {list(wanted[1])}"
        self.log.differs(check, tensor=entry.name, file=entry.file, expected=expected, found=header.text())
        return None

    def finish(self) -> None:
        """Say which tensors no shard had. Head copies are there all together or not at all."""
        if self.copies.keys() <= self.owed.keys():
            for copy in self.copies:
                del self.owed[copy]
        for name, (dtypes, shape) in self.owed.items():
            check = "mtp" if name.startswith("mtp.") else "tensors"
            expected = f"{' or '.join(dtypes)} {list(shape)}"
            self.log.differs(check, tensor=name, expected=expected, found="no such tensor in any shard")
            self.split.discard(name.rpartition(".")[0])
        if not self.log.differences:
            for module in sorted(self.split):
                expected, found = "all tensors of a linear in one shard", "parts of it in several, not judged"
                self.log.differs("tensors", tensor=module, expected=expected, found=found)


class _Found:
    """The work on one shard, and what it finds."""

    def __init__(self, case: Case, exact: Counter[str], errors: Mapping[str, ErrorStats]) -> None:
        self.case, self.exact, self.errors = case, exact, errors
        self.globals: dict[str, dict[str, float]] = {}
        """Module -> suffix -> its global scale; w1 and w3 have to share theirs."""

    def jobs(self) -> Iterator[Job]:
        """All of it, in the order in which differences are told."""
        survey = self.case.survey
        for name, header in survey.sound.items():
            if name.rpartition(".")[0] not in survey.schemes:
                yield from _Generated(self.case, name, header).jobs()
        batches: dict[tuple[str, Shape, Shape], list[TensorSpec]] = defaultdict(list)
        for spec, scheme in self.linears():
            if scheme.is_general or scheme.format not in (NVFP4, FP8):
                yield self.thorough(spec, scheme)
                continue
            kinds = tuple(survey.sound[f"{spec.module}.{suffix}"].dtype for suffix in scheme.stored(spec.shape))
            batch = batches[(scheme.format, spec.shape, kinds)]  # type: ignore[index]
            batch.append(spec)
            if (len(batch) + 1) * 2 * spec.nbytes > BATCH_BYTES:
                yield _Batch(self, scheme, tuple(batch))
                batch.clear()
        for batch in batches.values():
            if batch:
                yield _Batch(self, survey.schemes[batch[0].module], tuple(batch))

    def linears(self) -> Iterator[tuple[TensorSpec, Scheme]]:
        """Quantized linears of this shard, all of whose tensors are sound."""
        survey = self.case.survey
        here = dict.fromkeys(name.rpartition(".")[0] for name in survey.sound)
        for module in here:
            scheme, spec = survey.schemes.get(module), survey.specs.get(f"{module}.weight")
            if scheme is None or spec is None:
                continue
            if all(f"{module}.{suffix}" in survey.sound for suffix in scheme.stored(spec.shape)):
                yield spec, scheme

    def thorough(self, spec: TensorSpec, scheme: Scheme) -> Linear:
        """The judge of one linear."""
        if not scheme.is_general:
            return Linear(self.case, spec, scheme, self.errors)
        from dsv4q.verify.general import GeneralLinear
        from dsv4q.verify.library import LibraryScheme

        assert isinstance(scheme, LibraryScheme)
        return GeneralLinear(self.case, spec, scheme, self.errors)

    def check_pairs(self) -> None:
        """The consumer fuses w1 and w3 and uses one scale for both."""
        for module, scales in self.globals.items():
            other = self.globals.get(f"{module.removesuffix('.w1')}.w3") if module.endswith(".w1") else None
            for suffix, value in scales.items() if other is not None else ():
                self.case.log.looked_at("pairs")
                if other is not None and other[suffix] != value:
                    name = f"{module.removesuffix('.w1')}.w3.{suffix}"
                    self.case.differs("pairs", name, f"{value!r}, as {module}.{suffix}", repr(other[suffix]))


class _Batch:
    """Linears of one shape and scheme, judged together while they are as they should be."""

    def __init__(self, found: _Found, scheme: Scheme, specs: tuple[TensorSpec, ...]) -> None:
        self.found, self.scheme, self.specs = found, scheme, specs
        self.label = specs[0].block
        sound = found.case.survey.sound
        self.suffixes = tuple(scheme.stored(specs[0].shape))
        self.size = sum(sound[f"{spec.module}.{suffix}"].nbytes for spec in specs for suffix in self.suffixes)
        self.memory = self.size
        self.host: dict[str, Tensor] = {}

    def load(self) -> None:
        """Everything from the disk to the host, stacked: [linears, ...] of each tensor."""
        case = self.found.case
        for suffix in self.suffixes:
            header = case.survey.sound[f"{self.specs[0].module}.{suffix}"]
            raw = torch.empty(
                (len(self.specs), header.nbytes), dtype=torch.uint8, pin_memory=case.device.type == "cuda"
            )
            for row, spec in zip(raw, self.specs, strict=True):
                case.artifact.read_into(f"{spec.module}.{suffix}", row.numpy().data)
            self.host[suffix] = raw.view(_DTYPES[header.dtype]).reshape(len(self.specs), *header.shape)

    def judge(self) -> None:
        case = self.found.case
        stored = {suffix: tensor.to(case.device, non_blocking=True) for suffix, tensor in self.host.items()}
        good = torch.ones(len(self.specs), dtype=torch.bool, device=case.device)
        for suffix, tensor in stored.items():
            if suffix.endswith("scale"):
                number = tensor.to(torch.float32)
                good &= (number.isfinite() & (number > 0)).flatten(1).all(dim=1)
        good &= self._equals_source(stored)
        fine_ones = good.tolist()
        for spec, fine in zip(self.specs, fine_ones, strict=True):
            if fine:
                case.log.looked_at("scales", sum(suffix.endswith("scale") for suffix in self.suffixes))
                case.log.looked_at("exact")
                self.found.exact[spec.role] += 1
                continue
            linear = self.found.thorough(spec, self.scheme)
            linear.load()
            linear.judge()
        self._note_globals(fine_ones)
        self.host.clear()

    def _equals_source(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Which of the linears decode to the source's weight bit for bit, -0 included; Bool [linears]."""
        source, device = self.found.case.source, self.found.case.device
        assert isinstance(source, GeneratedCheckpoint)
        weight = torch.empty((len(self.specs), *self.specs[0].shape), dtype=torch.bfloat16, device=device)
        for row, spec in zip(weight, self.specs, strict=True):
            source.copy_to(spec.name, row)
        if self.scheme.format == NVFP4:
            decoded = nvfp4_decode(stored["weight_packed"], stored["weight_scale"], stored["weight_global_scale"])
        else:
            decoded = fp8_block_decode(stored["weight"], stored["weight_scale"])
        return (decoded.view(torch.int32) == weight.to(torch.float32).view(torch.int32)).flatten(1).all(dim=1)

    def _note_globals(self, good: list[bool]) -> None:
        """A w1 that had its own judge has been held against its w3."""
        for suffix in (suffix for suffix in _PAIRED if suffix in self.host):
            for spec, value, fine in zip(self.specs, self.host[suffix].flatten().tolist(), good, strict=True):
                if fine or not spec.module.endswith(".w1"):
                    self.found.globals.setdefault(spec.module, {})[suffix] = value


class _Generated(Untouched):
    """An untouched tensor whose source is made up, piece by piece."""

    def jobs(self) -> Iterator[Piece]:
        size = self.header.nbytes
        for start in range(0, size, PIECE):
            yield _GeneratedPiece(self, start, min(PIECE, size - start), last=start + PIECE >= size)


class _GeneratedPiece(Piece):
    def _source_bytes(self) -> bytearray:
        source = self.tensor.case.source
        assert isinstance(source, GeneratedCheckpoint)
        piece = bytearray(self.size)
        source.read_part(self.tensor.main, self.start, memoryview(piece))
        return piece
