"""Quantized linears of an artifact: scales, packed values, and the source encoded again.

What a scheme's own values can be, decode to and encode from is asked of the scheme. The bounds on scales hold for the
grids that `bounds.py` knows. Of every other format it is demanded that the error is not larger than the weight itself:
a grid that has zero, rounded to nearest, cannot be farther off, and another expert's weight is so by a factor of
sqrt(2). What passes nevertheless is a scale wrong by a small factor, encoded anew.

Memory: a GPU judges one linear at a time, with its source as F32 and some temporaries of that size, while the next are
loaded. On a CPU each thread judges one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dsv4q.checkpoint.native import entries_of
from dsv4q.errors import SourceError, WeightError
from dsv4q.formats.compare import tensor_error
from dsv4q.formats.dtypes import tensor_bytes
from dsv4q.formats.error import TensorError
from dsv4q.layout import TensorSpec
from dsv4q.verify.bounds import Blocks, dishonest_scales, far_elements, powers_of_two
from dsv4q.verify.case import Case
from dsv4q.verify.exactness import Exponents, fp8_possible, have_one_window
from dsv4q.verify.result import reason
from dsv4q.verify.schemes import FP8, NVFP4, Refused, StoredScheme, ValueGrid, place

_MOST = 1.0
"""Largest relative error, in Frobenius norms, where no sharper bound is derived."""


_BF16, _F32 = 2.0**-8, 2.0**-22
"""Relative rounding of a quotient, with room for the products around it."""
_Unequal = tuple[Tensor, Tensor, Tensor]
HOST_PASSES = 8
"""Times the bytes of a BF16 weight that a CPU has in memory while it judges one linear."""


def bytes_stored(case: Case, specs: Iterable[TensorSpec]) -> int:
    """Of what the artifact has of these weights."""
    suffixes = ((spec, suffix) for spec in specs for suffix in case.contract.schemes[spec.module].stored(spec.shape))
    return sum(case.sound[f"{spec.module}.{suffix}"].nbytes for spec, suffix in suffixes)


def bytes_on_disk(case: Case, specs: Iterable[TensorSpec]) -> int:
    """Of what the source has of these weights."""
    source = case.source
    return 0 if source is None else sum(e.nbytes for spec in specs for e in entries_of(source, spec.name))


class SharedScales:
    """Scales that w1 and w3 of an expert have in common: the consumer fuses the two and uses one scale for both."""

    def __init__(self, case: Case, pairs: Mapping[str, str], kept: Mapping[str, Tensor]) -> None:
        """`pairs`: a scale of w1 -> the same of w3; `kept`: those of them that were read before, from other shards."""
        self.case, self.pairs, self.kept = case, pairs, kept
        self.label = "experts' scales"
        self.size, self.read, self.memory = 0, 0, 0
        self.values: dict[str, Tensor] = {}

    def load(self) -> None:
        """Both from the disk, F32 [1] on the host."""
        names = [name for pair in self.pairs.items() for name in pair]
        self.values = {name: self.kept[name] for name in names if name in self.kept}
        if here := [name for name in names if name not in self.kept]:
            (stack,) = self.case.artifact.stored_together(here)
            self.values |= zip(here, stack.unbind(), strict=True)

    def judge(self) -> None:
        """Every bit must be equal."""
        for one, other in self.pairs.items():
            self.case.log.looked_at("pairs")
            mine, theirs = self.values[one], self.values[other]
            if not torch.equal(mine.view(torch.int32), theirs.view(torch.int32)):
                self.case.differs("pairs", other, f"{mine.item()!r}, as {one}", repr(theirs.item()))


class Linear:
    """One quantized linear, all of whose tensors are sound by their headers.

    Args:
        pairs, kept: what it has in common with its partner; see `SharedScales`.
    """

    def __init__(
        self, case: Case, spec: TensorSpec, scheme: StoredScheme, pairs: Mapping[str, str], kept: Mapping[str, Tensor]
    ) -> None:
        self.all, self.case = case, case.apart()
        self.spec, self.scheme, self.shared = spec, scheme, SharedScales(self.case, pairs, kept)
        self.names = {suffix: f"{spec.module}.{suffix}" for suffix in scheme.stored(spec.shape)}
        self.label = spec.block
        self.size = bytes_stored(case, [spec])
        self.read = self.size + bytes_on_disk(case, [spec])
        self.on_host = case.device is not None and case.device.type == "cpu"
        self.memory = self.size + (0 if case.source is None else spec.nbytes * (HOST_PASSES if self.on_host else 1))
        self.stored: dict[str, Tensor] = {}
        self.weight: Tensor | None = None
        self.judged = False
        self.lost: SourceError | None = None
        """Why the artifact's tensors are not there."""
        self.unread: SourceError | WeightError | None = None
        """Why the source's weight is not there."""

    def load(self) -> None:
        """Everything from the disk to the device; on the host, judge too."""
        case = self.case
        try:
            for suffix, name in self.names.items():
                tensor = case.artifact.tensor(name)
                if case.hashed:
                    case.digests[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
                self.stored[suffix] = tensor.to(case.device)
            self.shared.load()
        except SourceError as error:
            self.lost = error
            return
        if case.source is not None and case.source_fault(self.spec) is None and not case.is_lost(self.spec.name):
            assert case.device is not None, "values are judged on a device"
            try:
                self.weight = case.source.tensor_on(self.spec.name, case.device)
            except (SourceError, WeightError) as error:
                self.unread = error
        if self.on_host:
            self._judge()
            self.judged = True

    def judge(self) -> None:
        if not self.judged:
            self._judge()
        self.all.take(self.case)

    def _judge(self) -> None:
        if self.lost is None:
            self._look()
        else:
            name = next(iter(self.names.values()))
            self.case.differs("values", name, "tensors that can be read", reason(self.lost))
        self.stored, self.weight = {}, None

    def _look(self) -> None:
        case, usable = self.case, self._scales()
        for fault in self.scheme.undecodable(self.stored, self.spec.shape):
            self._told_of_values(*fault)
            usable = False
        if case.deep:
            case.log.looked_at("values", len(self.scheme.value_tensors(self.stored)))
            for fault in self.scheme.impossible(self.stored, self.spec.shape):
                self._told_of_values(*fault)
        self.shared.judge()
        if self.unread is not None:
            case.differs("source", self.spec.name, "a weight of the source that can be read", reason(self.unread))
            return
        if case.source is None or not usable or case.is_lost(self.spec.name):
            return
        why_not = case.source_fault(self.spec)
        if why_not is not None:
            wanted = f"{self.spec.dtype} {list(self.spec.shape)} in the source"
            case.differs("source", self.spec.name, wanted, why_not)
        elif self.weight is not None and not bool(self.weight.isfinite().all()):
            where = f"not at {place(~self.weight.isfinite())}"
            case.differs("source", self.spec.name, "finite weights in the source", where)
        elif self.weight is not None:
            self._against_source(self.weight)

    # ------------------------------------------------------------------------------------ by itself

    def _scales(self) -> bool:
        """Every scale finite and positive."""
        fine = True
        for suffix in (suffix for suffix in self.stored if suffix.endswith("scale")):
            self.case.log.looked_at("scales")
            scale = self.scheme.numbers(self.stored[suffix])
            if bool((scale.isfinite() & (scale > 0)).all()):
                continue
            fine = False
            kinds = {
                "NaN": scale.isnan(), "infinite": scale.isinf(), "zero": scale == 0, "negative": scale < 0,
            }  # fmt: skip
            for kind, mask in kinds.items():
                if bool(mask.any()):
                    found = f"{int(mask.sum()):,} of {mask.numel():,} are {kind}, the first at {place(mask)}"
                    self.case.differs("scales", self.names[suffix], "scales that are finite and positive", found)
        return fine

    def _told_of_values(self, suffix: str, expected: str, found: str) -> None:
        self.case.differs("values", self.names[suffix], expected, found)

    # ------------------------------------------------------------------------------------ against the source

    def _against_source(self, weight: Tensor) -> None:
        self.case.log.looked_at("encoding")
        try:
            self._decoded_and_encoded(weight)
        except Refused as error:
            expected = "tensors that compressed-tensors can decode and encode"
            self.case.differs("encoding", self.names["weight_scale"], expected, str(error))

    def _decoded_and_encoded(self, weight: Tensor) -> None:
        decoded, full = self.scheme.decode(self.stored), weight.float()
        # encode divides in the promoted dtype; only BF16 by BF16 rounds the quotient to BF16.
        bf16 = weight.dtype == self.stored["weight_scale"].dtype == torch.bfloat16
        unit = self.scheme.unit(decoded)
        error = tensor_error(full, decoded["weight"])
        errors = self.case.errors[self.spec.class_name]
        errors.add(self.spec.module, error)
        errors.power_of_two_scales += powers_of_two(unit)
        if not self._reencodes(weight, decoded, _BF16 if bf16 else _F32):
            return
        self._is_as_exact_as_it_could_be(full, decoded["weight"], len(unit), error)
        self.case.log.looked_at("error")
        if self.scheme.grid is None:
            self._not_worse_than_nothing(error)
            return
        weights = [self.scheme.blocks(one, len(unit)) for one in (full, decoded["weight"])]
        blocks = Blocks(weights[0], weights[1], unit)
        self._bounds(blocks, self.scheme.grid, bf16_quotient=bf16)

    def _is_as_exact_as_it_could_be(self, full: Tensor, decoded: Tensor, count: int, error: TensorError) -> None:
        """Count it if all of it could be exact; where the recipe says so, each block that could be must be."""
        blocks, stored = (self.scheme.blocks(one, count) for one in (full, decoded))
        if self.scheme.format == NVFP4:
            global_scale = float(self.stored["weight_global_scale"])
            exponents = Exponents.of(blocks)
            possible, all_of_it = exponents.under(global_scale), have_one_window(exponents.ends())
        elif self.scheme.format == FP8:
            possible = fp8_possible(blocks)
            all_of_it = bool(possible.all())
        else:
            return
        is_exact = error.exact_fraction == 1.0
        self.case.errors[self.spec.role].could_be_exact += all_of_it and not is_exact
        if is_exact or self.spec.module not in self.case.promised:
            return
        lost = (blocks.view(torch.int32) != stored.view(torch.int32)).any(dim=-1)
        if all_of_it and self.scheme.format == NVFP4 and have_one_window(exponents.ends(), *self._partner()):
            possible = torch.ones_like(possible)
        missed = possible & lost
        if bool(missed.any()):
            scale = self.stored["weight_scale"]
            where = list(divmod(int(missed.nonzero()[0]), scale.shape[-1]))
            found = f"{int(missed.sum()):,} of {missed.numel():,} blocks are not, the first at {where}"
            expected = "exact blocks: the source is on the grid, and recipe.yaml names an exact observer"
            self.case.differs("exact", self.names["weight_scale"], expected, found)

    def _partner(self) -> Iterator[tuple[int, int] | None]:
        """`Exponents.ends` of the linear that shares the global scale, if there is one."""
        expert, _, projection = self.spec.module.rpartition(".")
        other = f"{expert}.{ {'w1': 'w3', 'w3': 'w1'}.get(projection, '') }.weight"
        source, spec = self.case.source, self.case.contract.specs.get(other)
        if source is None or spec is None or self.case.source_fault(spec) is not None or self.case.is_lost(other):
            return
        assert self.case.device is not None
        try:
            weight = source.tensor_on(other, self.case.device).float()
        except (SourceError, WeightError):
            return
        yield Exponents.of(weight.reshape(-1, 16)).ends()

    def _reencodes(self, weight: Tensor, decoded: Mapping[str, Tensor], rounding: float) -> bool:
        """Every stored code is a nearest one of its quotient, with every -0 kept or with none.

        Eager encoders round the quotient to the promoted dtype, kernels to F32, so near the middle of two values either
        is right: what lies between the codes of the quotients that `rounding` (relative) allows.
        """
        tries, between = [], None
        for keep in (True, False):
            encoded = self.scheme.encode(weight, decoded, keep_negative_zero=keep)
            unequal = dict(self._unequal(encoded))
            if unequal:
                between = self._between(weight, decoded, rounding) if between is None else between
                unequal = self._wrong(unequal, encoded, decoded, between)
            if not unequal:
                return True
            tries.append(unequal)
        nearest = min(tries, key=lambda unequal: sum(int(mask.sum()) for mask, _, _ in unequal.values()))
        for suffix, (mask, again, stored) in nearest.items():
            first = place(mask)
            found = (
                f"{int(mask.sum()):,} of {mask.numel():,} bytes differ, the first at {first}: "
                f"0x{int(stored[tuple(first)]):02x} instead of 0x{int(again[tuple(first)]):02x}"
            )
            expected = "the source's weight, encoded with the artifact's own scales"
            self.case.differs("encoding", self.names[suffix], expected, found)
        return False

    def _between(self, weight: Tensor, decoded: Mapping[str, Tensor], rounding: float) -> Tensor:
        """Bool [out, in]: where the stored value lies between those of the smallest and the largest quotient."""
        ends = []
        for factor in (1 - rounding, 1 + rounding):
            encoded = self.scheme.encode(weight.float() * factor, decoded, keep_negative_zero=True)
            ends.append(self.scheme.decode({**self.stored, **encoded})["weight"])
        value = decoded["weight"]
        return (value >= torch.minimum(*ends)) & (value <= torch.maximum(*ends))

    def _wrong(
        self, unequal: dict[str, _Unequal], encoded: Mapping[str, Tensor], decoded: Mapping[str, Tensor], right: Tensor
    ) -> dict[str, _Unequal]:
        """Of the tensors that differ those that are wrong, and where: a code that is right has the right sign too."""
        again = self.scheme.decode({**self.stored, **encoded})["weight"]
        wrong = ~right | (again.signbit() != decoded["weight"].signbit())
        if not bool(wrong.any()):
            return {}
        found = {}
        for suffix, (mask, ours, theirs) in unequal.items():
            values = wrong.shape[1] // mask.shape[-1]
            if mask.ndim == 2 and mask.shape[-1] * values == wrong.shape[1]:
                mask = mask & wrong.unflatten(1, (-1, values)).any(dim=-1)
            if bool(mask.any()):
                found[suffix] = mask, ours, theirs
        return found

    def _unequal(self, encoded: Mapping[str, Tensor]) -> Iterator[tuple[str, _Unequal]]:
        """Tensors that differ: where, the source's bytes, the artifact's bytes."""
        for suffix, tensor in self.stored.items():
            if suffix.startswith("weight") and suffix in encoded:
                again, stored = (_bytes(one) for one in (encoded[suffix].to(tensor.device), tensor))
                if not torch.equal(again, stored):
                    yield suffix, (again != stored, again, stored)

    def _bounds(self, blocks: Blocks, grid: ValueGrid, *, bf16_quotient: bool) -> None:
        far = far_elements(blocks, grid, bf16_quotient=bf16_quotient)
        if bool(far.any()):
            found = f"{int(far.sum()):,} of {far.numel():,} values are farther off"
            self.case.differs("error", self._values, "values within half a step of the source's", found)
        wrong = dishonest_scales(blocks, grid, self.stored.get("weight_global_scale"))
        if not bool(wrong.any()):
            return
        scale = self.stored["weight_scale"]
        first = int(wrong.nonzero()[0])
        where = list(divmod(first, scale.shape[-1])) if scale.ndim > 1 else [first]
        ideal = float(blocks.weight[first].abs().amax()) / grid.range
        found = (
            f"{int(wrong.sum()):,} of {wrong.numel():,} scales, the first at {where}: one unit is worth "
            f"{float(blocks.unit[first]):.6g}, the source needs {ideal:.6g}"
        )
        expected = "scales that the source's largest magnitudes explain"
        self.case.differs("error", self.names["weight_scale"], expected, found)

    def _not_worse_than_nothing(self, error: TensorError) -> None:
        if error.relative > _MOST:
            expected = f"a relative error of at most {_MOST:g}, that of a weight of zeros"
            self.case.differs("error", self._values, expected, f"{error.relative:.4g}")

    @property
    def _values(self) -> str:
        return self.names["weight_packed" if "weight_packed" in self.names else "weight"]


def _bytes(tensor: Tensor) -> Tensor:
    """U8 of the same rank; flat in between, because a last dimension of one may have any stride."""
    return tensor.contiguous().flatten().view(torch.uint8).reshape(*tensor.shape[:-1], -1)
