"""The values of an artifact, one tensor at a time: `verify-shards --deep` and `--source`.

Memory: one linear with its source as F32 and a few temporaries of that size; untouched tensors in pieces of 16 MiB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4q.calibration.encode import (
    fp8_block_decode,
    fp8_block_encode,
    int_group_decode,
    int_group_encode,
    nvfp4_decode,
    nvfp4_encode,
    nvfp4_scale,
)
from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.layout import Dims, TensorSpec
from dsv4q.checkpoint.native import is_dequantized, scan_source
from dsv4q.checkpoint.source import Checkpoint, scan
from dsv4q.checkpoint.verify_bounds import (
    E2M1,
    E4M3,
    Blocks,
    Grid,
    dishonest_scales,
    far_elements,
    integer_grid,
    powers_of_two,
)
from dsv4q.checkpoint.verify_config import FP8, INT, NVFP4, Scheme
from dsv4q.checkpoint.verify_files import Header
from dsv4q.checkpoint.verify_result import ErrorStats, Log
from dsv4q.errors import SourceError

if TYPE_CHECKING:
    from dsv4q.checkpoint.verify import Progress, Survey

_PIECE = 16 << 20
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_SCALES = ("weight_scale", "weight_global_scale", "input_global_scale")
_PAIRED = ("weight_global_scale", "input_global_scale")


def judge_values(
    survey: Survey, source: Path | None, deep: bool, progress: Progress | None, device: str, log: Log
) -> dict[str, ErrorStats]:
    """Look at the tensors that the header checks found sound; returns error statistics by tensor class.

    Raises:
        SourceError: the source has no usable config.json; reading fails.
    """
    with scan(survey.root) as artifact:
        if source is None:
            return _Judge(survey, artifact, None, deep, progress, device, log).run()
        with scan_source(source) as original:
            _compare_folders(survey, original, log)
            return _Judge(survey, artifact, original, deep, progress, device, log).run()


def _compare_folders(survey: Survey, source: Checkpoint, log: Log) -> None:
    """The source must be sound and of the same dimensions; its config and small files must have come along."""
    for problem in source.problems:
        log.differs("source", file=problem.where, expected=problem.expected or "a sound source", found=problem.what)
    _compare_configs(survey.config, source.config, log)
    for path in sorted(source.root.iterdir()) + sorted(source.root.glob("encoding/*")):
        name = path.relative_to(source.root).as_posix()
        if not path.is_file() or not name.startswith(("tokenizer", "generation_config.json", "encoding/")):
            continue
        log.looked_at("source")
        copy = survey.root / name
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            found = "another file" if copy.is_file() else "no such file"
            log.differs("source", file=name, expected="the source's file", found=found)


def _compare_configs(config: Mapping[str, Any], source: Mapping[str, Any], log: Log) -> None:
    """Every key kept. Without its draft, an artifact says so in num_nextn_predict_layers and compress_ratios."""
    dropped = config.get("num_nextn_predict_layers") == 0
    for key in sorted((config.keys() | source.keys()) - {"quantization_config"}):
        log.looked_at("source")
        ours, theirs = config.get(key, "no such key"), source.get(key, "no such key")
        if key == "compress_ratios":
            layers = Dims.from_config(config).layers
            ours, theirs = (value[:layers] if isinstance(value, list) else value for value in (ours, theirs))
        if ours != theirs and not (dropped and key == "num_nextn_predict_layers"):
            log.differs("source", file="config.json", expected=f"{key}: {theirs!r}", found=repr(ours))


class _Judge:
    def __init__(
        self,
        survey: Survey,
        artifact: Checkpoint,
        source: Checkpoint | None,
        deep: bool,
        progress: Progress | None,
        device: str,
        log: Log,
    ) -> None:
        self.survey, self.artifact, self.source, self.deep = survey, artifact, source, deep
        self.progress, self.device, self.log = progress, torch.device(device), log
        self.errors: dict[str, ErrorStats] = defaultdict(ErrorStats)
        self.done = 0
        self.total = self._total()

    def run(self) -> dict[str, ErrorStats]:
        quantized = set(self.survey.schemes)
        for name, header in self.survey.sound.items():
            if name.rpartition(".")[0] not in quantized:
                self._untouched(name, header)
                self._advance(name, header.nbytes)
        for module, scheme in self.survey.schemes.items():
            spec = self.survey.specs[f"{module}.weight"]
            names = {suffix: f"{module}.{suffix}" for suffix in scheme.stored(spec.shape)}
            if all(name in self.survey.sound for name in names.values()):
                self._quantized(spec, scheme, names)
            self._advance(
                spec.block, sum(self.survey.sound[n].nbytes for n in names.values() if n in self.survey.sound)
            )
        return dict(self.errors)

    def _total(self) -> int:
        return sum(header.nbytes for header in self.survey.sound.values())

    def _advance(self, label: str, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(label, self.done, self.total)

    # ------------------------------------------------------------------------------------ untouched tensors

    def _untouched(self, name: str, header: Header) -> None:
        twin = self._twin(name, header)
        pieces = _pieces(self.survey.root / header.file, header.start, header.nbytes, name)
        others = iter(()) if twin is None or self.source is None else _source_pieces(self.source, twin)
        different, first, done = 0, 0, 0
        findings = _NonFinite(header.dtype, self.survey.dims.experts if name.endswith(".tid2eid") else None)
        for piece in pieces:
            if self.deep:
                findings.look(piece)
            if twin is not None:
                other = next(others)
                if piece != other:
                    unequal = torch.frombuffer(piece, dtype=torch.uint8) != torch.frombuffer(other, dtype=torch.uint8)
                    first = first if different else done + int(unequal.nonzero()[0])
                    different += int(unequal.sum())
            done += len(piece)
        if different and twin is not None:
            found = f"{different:,} of {header.nbytes:,} bytes differ, the first at byte {first:,} of the tensor"
            self._differs("bytes", name, f"the bytes of {twin.name} in the source", found)
        if self.deep:
            self.log.looked_at("values")
            for expected, found in findings.faults():
                self._differs("values", name, expected, found)

    def _twin(self, name: str, header: Header) -> TensorEntry | None:
        """The source's tensor that this one must equal."""
        if self.source is None:
            return None
        self.log.looked_at("bytes")
        main = self.survey.copies.get(name, name)
        twin = self.source.tensors.get(main)
        if twin is None:
            self._differs("source", name, f"{main} in the source", "no such tensor")
        elif (twin.dtype, twin.shape) != (header.dtype, header.shape):
            self._differs("bytes", name, f"{twin.dtype} {list(twin.shape)}, as in the source", header.text())
            return None
        return twin

    def _differs(self, check: str, name: str, expected: str, found: str) -> None:
        file = self.survey.sound[name].file if name in self.survey.sound else None
        self.log.differs(check, tensor=name, file=file, expected=expected, found=found)

    # ------------------------------------------------------------------------------------ quantized linears

    def _quantized(self, spec: TensorSpec, scheme: Scheme, names: Mapping[str, str]) -> None:
        stored = {suffix: self.artifact.tensor(name) for suffix, name in names.items()}
        usable = self._scales(stored, names)
        if self.deep:
            self._packed(spec, scheme, stored, names)
            if scheme.format == NVFP4 and spec.module.endswith(".w1"):
                self._pair(spec.module, stored, names)
        if self.source is not None and usable:
            weight = self._source_weight(spec)
            if weight is not None:
                moved = {suffix: tensor.to(self.device) for suffix, tensor in stored.items()}
                self._against_source(spec, scheme, moved, names, weight.to(self.device))

    def _scales(self, stored: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
        """Every scale finite and positive."""
        fine = True
        for suffix in (suffix for suffix in _SCALES if suffix in stored):
            self.log.looked_at("scales")
            scale = stored[suffix].to(torch.float32)
            kinds = {
                "NaN": scale.isnan(), "infinite": scale.isinf(), "zero": scale == 0, "negative": scale < 0,
            }  # fmt: skip
            bad = {kind: mask for kind, mask in kinds.items() if bool(mask.any())}
            fine = fine and not bad
            for kind, mask in bad.items():
                found = f"{int(mask.sum()):,} of {mask.numel():,} are {kind}, the first at {_place(mask)}"
                self._differs("scales", names[suffix], "scales that are finite and positive", found)
        return fine

    def _packed(self, spec: TensorSpec, scheme: Scheme, stored: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        """What can be wrong in the values without knowing the source. Every NVFP4 byte is a pair of valid values."""
        self.log.looked_at("values")
        if scheme.format == FP8:
            nan = stored["weight"].view(torch.uint8).bitwise_and(0x7F) == 0x7F
            if bool(nan.any()):
                found = f"{int(nan.sum()):,} NaN (0x7F or 0xFF), the first at {_place(nan)}"
                self._differs("values", names["weight"], "E4M3 values without NaN", found)
        if scheme.format == INT:
            shape = stored["weight_shape"].tolist()
            if shape != list(spec.shape):
                self._differs("values", names["weight_shape"], str(list(spec.shape)), str(shape))
            used = spec.shape[1] * scheme.bits % 32
            filling = stored["weight_packed"][:, -1] >> used if used else torch.zeros(1)
            if bool((filling != 0).any()):
                self._differs("values", names["weight_packed"], "zero bits after the last column", "other bits")

    def _pair(self, w1: str, stored: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        """The consumer fuses w1 and w3 and uses one scale for both."""
        w3 = f"{w1.removesuffix('.w1')}.w3"
        for suffix in (suffix for suffix in _PAIRED if suffix in stored):
            self.log.looked_at("pairs")
            other = f"{w3}.{suffix}"
            if other in self.survey.sound and bytes(self.artifact.read(other)) != stored[suffix].numpy().tobytes():
                expected = f"{stored[suffix].item()!r}, as {names[suffix]}"
                self._differs("pairs", other, expected, repr(self.artifact.tensor(other).item()))

    def _source_weight(self, spec: TensorSpec) -> Tensor | None:
        assert self.source is not None
        entry = self.source.tensors.get(spec.name)
        if entry is None or entry.dtype not in _FLOATS or entry.shape != spec.shape:
            found = "no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            self._differs("source", spec.name, f"{spec.dtype} {list(spec.shape)} in the source", found)
            return None
        weight = self.source.tensor(spec.name)
        if not bool(weight.isfinite().all()):
            self._differs("source", spec.name, "finite weights in the source", f"not at {_place(~weight.isfinite())}")
            return None
        return weight

    def _against_source(
        self, spec: TensorSpec, scheme: Scheme, stored: Mapping[str, Tensor], names: Mapping[str, str], weight: Tensor
    ) -> None:
        self.log.looked_at("encoding")
        values = "weight" if scheme.format == FP8 else "weight_packed"
        decoded = _decode(scheme, stored)
        full = weight.to(torch.float32)
        unit = _unit(stored)
        noise = float((full - decoded).square_().sum(dtype=torch.float64))
        self.errors[spec.role].add(
            spec.module,
            float(full.square().sum(dtype=torch.float64)),
            noise,
            power_of_two=powers_of_two(unit),
        )
        found = stored[values].view(torch.uint8)
        again = _encode(scheme, stored, weight).view(torch.uint8)
        if not torch.equal(again, found):
            kept = _encode(scheme, stored, weight, keep_negative_zero=True).view(torch.uint8)
            if not torch.equal(kept, found):
                self._other_bytes(names[values], again, found)
                return
        self.log.looked_at("error")
        grid = {NVFP4: E2M1, FP8: E4M3}.get(scheme.format) or integer_grid(scheme.bits)
        blocks = _blocks(scheme, full, decoded, unit)
        # encode divides in the promoted dtype; only BF16 by BF16 rounds the quotient to BF16.
        bf16 = scheme.format != NVFP4 and weight.dtype == stored["weight_scale"].dtype == torch.bfloat16
        self._far(far_elements(blocks, grid, bf16_quotient=bf16), names[values])
        self._scale_choice(blocks, grid, stored, names["weight_scale"])

    def _other_bytes(self, name: str, again: Tensor, stored: Tensor) -> None:
        unequal = again != stored
        first = unequal.nonzero()[0].tolist()
        found = (
            f"{int(unequal.sum()):,} of {unequal.numel():,} bytes differ, the first at {first}: "
            f"0x{int(stored[tuple(first)]):02x} instead of 0x{int(again[tuple(first)]):02x}"
        )
        self._differs("encoding", name, "the source's weight, encoded with the artifact's own scales", found)

    def _far(self, far: Tensor, name: str) -> None:
        if bool(far.any()):
            found = f"{int(far.sum()):,} of {far.numel():,} values are farther off"
            self._differs("error", name, "values within half a step of the source's", found)

    def _scale_choice(self, blocks: Blocks, grid: Grid, stored: Mapping[str, Tensor], name: str) -> None:
        wrong = dishonest_scales(blocks, grid, stored.get("weight_global_scale"))
        if not bool(wrong.any()):
            return
        scale = stored["weight_scale"]
        first = int(wrong.nonzero()[0])
        place = [first // scale.shape[-1], first % scale.shape[-1]]
        ideal = float(blocks.weight[first].abs().amax()) / grid.range
        found = (
            f"{int(wrong.sum()):,} of {wrong.numel():,} scales, the first at {place}: one unit is worth "
            f"{float(blocks.unit[first]):.6g}, the source needs {ideal:.6g}"
        )
        self._differs("error", name, "scales that the source's largest magnitudes explain", found)


def _encode(
    scheme: Scheme, stored: Mapping[str, Tensor], weight: Tensor, *, keep_negative_zero: bool = False
) -> Tensor:
    """The bytes that these scales give. Encoders may keep the sign of a -0 or store +0: throughout a tensor."""
    if scheme.format == NVFP4:
        return nvfp4_encode(
            weight, stored["weight_scale"], stored["weight_global_scale"], keep_negative_zero=keep_negative_zero
        )
    if scheme.format == FP8:
        return fp8_block_encode(weight if keep_negative_zero else weight + 0.0, stored["weight_scale"])
    return int_group_encode(weight, stored["weight_scale"], scheme.bits, scheme.columns or weight.shape[-1])


def _decode(scheme: Scheme, stored: Mapping[str, Tensor]) -> Tensor:
    """F32 [out, in]."""
    if scheme.format == NVFP4:
        return nvfp4_decode(stored["weight_packed"], stored["weight_scale"], stored["weight_global_scale"])
    if scheme.format == FP8:
        return fp8_block_decode(stored["weight"], stored["weight_scale"])
    columns = scheme.columns or stored["weight_packed"].shape[-1] * 32 // scheme.bits
    return int_group_decode(stored["weight_packed"], stored["weight_scale"], scheme.bits, columns)


def _unit(stored: Mapping[str, Tensor]) -> Tensor:
    """Effective scales, F32 [n]: in the order of `_blocks`."""
    scale, divisor = stored["weight_scale"], stored.get("weight_global_scale")
    return (scale.to(torch.float32) if divisor is None else nvfp4_scale(scale, divisor)).flatten()


def _blocks(scheme: Scheme, weight: Tensor, decoded: Tensor, unit: Tensor) -> Blocks:
    if scheme.format == FP8:
        return Blocks(_squares(weight), _squares(decoded), unit)
    columns = weight.numel() // unit.numel()
    return Blocks(weight.reshape(-1, columns), decoded.reshape(-1, columns), unit)


def _squares(weight: Tensor) -> Tensor:
    """[n, 128*128] of [out, in], blocks row by row; the edge is filled with zeros, which have no error."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padding = (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0])
    filled = torch.nn.functional.pad(weight, padding)
    return filled.reshape(rows, 128, columns, 128).transpose(1, 2).reshape(rows * columns, -1)


class _NonFinite:
    """Values of an untouched tensor that cannot be right, counted piece by piece."""

    def __init__(self, dtype: str, experts: int | None) -> None:
        self.dtype, self.experts = _FLOATS.get(dtype), experts
        self.bad = 0

    def look(self, piece: bytearray) -> None:
        if not piece:
            return
        if self.dtype is not None:
            self.bad += int((~torch.frombuffer(piece, dtype=self.dtype).isfinite()).sum())
        elif self.experts is not None:
            table = torch.frombuffer(piece, dtype=torch.int64)
            self.bad += int(((table < 0) | (table >= self.experts)).sum())

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.bad:
            expected = "finite values" if self.dtype is not None else f"expert numbers below {self.experts}"
            yield expected, f"{self.bad:,} others"


def _pieces(path: Path, start: int, nbytes: int, name: str) -> Iterator[bytearray]:
    """A tensor's bytes, at most 16 MiB at a time."""
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while nbytes > 0:
                piece = bytearray(min(nbytes, _PIECE))
                view, filled = memoryview(piece), 0
                while filled < len(piece):
                    count = stream.readinto(view[filled:])
                    if not count:
                        raise SourceError("A shard ended while it was read", where=f"{path}: {name}")
                    filled += count
                nbytes -= len(piece)
                yield piece
    except OSError as error:
        raise SourceError(
            "Reading a shard failed", where=f"{path}: {name}", found=error, hint="check the disk"
        ) from error


def _source_pieces(source: Checkpoint, twin: TensorEntry) -> Iterator[memoryview | bytearray]:
    """`_pieces` of a tensor of the source; one that is dequantized when read is read whole, then cut."""
    if not is_dequantized(source, twin.name):
        yield from _pieces(source.root / twin.file, twin.start, twin.nbytes, twin.name)
        return
    whole = source.read(twin.name)
    for start in range(0, twin.nbytes, _PIECE):
        yield whole[start : start + _PIECE]


def _place(mask: Tensor) -> list[int]:
    """Index of the first true element."""
    place: list[int] = mask.nonzero()[0].tolist()
    return place
