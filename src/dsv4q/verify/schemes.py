"""How an artifact stores a linear, as the judge knows it: what lies there, what it is worth, what can be wrong in it.

NVFP4, FP8 in 128x128 blocks and symmetric packed integers are written down here in closed form; `library.py` has every
other scheme. Names, dtypes and shapes are told without torch; whatever looks at values imports it then.

Source: contract.md; compressed-tensors' compressors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from dsv4q.layout import Shape

if TYPE_CHECKING:
    from torch import Tensor

NVFP4, FP8, INT = "nvfp4-pack-quantized", "float-quantized", "pack-quantized"

Stored = dict[str, tuple[tuple[str, ...], Shape]]
"""Suffix behind the module's name -> dtypes allowed, shape."""
Fault = tuple[str, str, str]
"""Suffix of the tensor, what was expected, what was found."""


class Refused(Exception):
    """Compressed-tensors cannot express or store this; the reason is its own, in one line."""


@dataclass(frozen=True)
class ValueGrid:
    """The values a format stores. Written down once more than in `formats`: the bounds must not trust the encoder."""

    kind: str
    """e2m1, e4m3 or int."""
    range: float
    """What the range observer divides the largest magnitude by."""
    largest: float
    """Largest value stored on both sides of zero."""

    def half_step(self, magnitude: Tensor) -> Tensor:
        """Half the distance of the two values around `magnitude`, in units of the scale; same shape."""
        import torch

        if self.kind == "int":
            return torch.full_like(magnitude, 0.5)
        if self.kind == "e2m1":
            return 0.25 + 0.25 * (magnitude >= 2) + 0.5 * (magnitude >= 4)
        exponent = torch.frexp(magnitude).exponent - 1
        return torch.exp2(exponent.clamp_(min=-6).to(torch.float32) - 4)


E2M1 = ValueGrid("e2m1", 6.0, 6.0)
E4M3 = ValueGrid("e4m3", 448.0, 448.0)


def integer_grid(bits: int) -> ValueGrid:
    """Symmetric integers."""
    return ValueGrid("int", (2**bits - 1) / 2, 2.0 ** (bits - 1) - 1)


@dataclass(frozen=True)
class StoredScheme(ABC):
    """How a group of quantization_config stores its linears.

    `stored` below is also the name of a linear's tensors by suffix, on one device.
    """

    group: str
    format: str
    bits: int
    columns: int | None
    """Columns per scale (integers); None: one scale per row."""
    input_scale: bool

    shared: ClassVar[tuple[str, ...]] = ()
    """Suffixes of scales that w1 and w3 of an expert must have in common."""
    in_batches: ClassVar[bool] = False
    """`decode` takes leading dimensions, so that many linears are one call."""
    in_squares: ClassVar[bool] = False
    """One scale per 128x128 block."""

    @abstractmethod
    def stored(self, shape: Shape) -> Stored:
        """Tensors of a linear [out, in] in this scheme.

        Raises:
            Refused: it cannot be stored so; only of schemes that are not closed.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weight` F32 [out, in], -0 kept, and everything else that `encode` and `unit` want.

        Raises:
            Refused: compressed-tensors cannot decode it.
        """

    @abstractmethod
    def encode(self, weight: Tensor, decoded: Mapping[str, Tensor], *, keep_negative_zero: bool) -> dict[str, Tensor]:
        """What of `weight` [out, in] is stored under the scales of `decoded`, by suffix.

        Each -0 is kept, or stored as +0: encoders do either, throughout a tensor.

        Raises:
            Refused: compressed-tensors cannot encode it.
        """

    @property
    @abstractmethod
    def grid(self) -> ValueGrid | None:
        """The values for which the bounds of `bounds.py` are derived; None: of another kind."""

    @property
    def input_arguments(self) -> Any:
        """compressed-tensors' `QuantizationArgs` of the inputs, where no kernel is written down for them; else None."""
        return None

    def misfit(self, shape: Shape) -> str | None:
        """Why a linear [out, in] cannot be stored so; None if it can."""
        ragged = isinstance(self.columns, int) and self.columns > 0 and shape[1] % self.columns != 0
        return f"{shape[1]} columns in groups of {self.columns}" if ragged else None

    def unit(self, decoded: Mapping[str, Tensor]) -> Tensor:
        """Effective scales, F32 [n], in the order of `blocks`."""
        return decoded["weight_scale"].float().flatten()

    def blocks(self, weight: Tensor, count: int) -> Tensor:
        """A weight [out, in] as `count` blocks that share a scale: [count, k]."""
        return weight.reshape(-1, weight.numel() // count)

    def numbers(self, scale: Tensor) -> Tensor:
        """A stored scale as F32."""
        return scale.float()

    def value_tensors(self, suffixes: Collection[str]) -> tuple[str, ...]:
        """Those of a linear's tensors whose values are looked at; `impossible` says what is wrong in them."""
        return ("weight_packed" if "weight_packed" in suffixes else "weight",)

    def undecodable(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
        """What forbids to decode a linear [out, in], scales aside."""
        yield from ()

    def impossible(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
        """What can be wrong in the values of a linear [out, in] without knowing its source."""
        yield from ()


@dataclass(frozen=True)
class Nvfp4Scheme(StoredScheme):
    """E2M1 in groups of 16 columns. Every byte is a pair of valid values."""

    shared: ClassVar[tuple[str, ...]] = ("weight_global_scale", "input_global_scale")
    in_batches: ClassVar[bool] = True

    @property
    def grid(self) -> ValueGrid:
        return E2M1

    def stored(self, shape: Shape) -> Stored:
        out, columns = shape
        tensors: Stored = {
            "weight_packed": (("U8",), (out, columns // 2)),
            "weight_scale": (("F8_E4M3",), (out, columns // 16)),
            "weight_global_scale": (("F32",), (1,)),
        }
        return tensors | ({"input_global_scale": (("F32",), (1,))} if self.input_scale else {})

    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from dsv4q.formats.stored import NVFP4, decode

        return {**stored, "weight": decode(NVFP4, stored)}

    def encode(self, weight: Tensor, decoded: Mapping[str, Tensor], *, keep_negative_zero: bool) -> dict[str, Tensor]:
        scales = decoded["weight_scale"], decoded["weight_global_scale"]
        packed = _numerics().nvfp4_encode(weight, *scales, keep_negative_zero=keep_negative_zero)
        return {"weight_packed": packed}

    def unit(self, decoded: Mapping[str, Tensor]) -> Tensor:
        scale: Tensor = _numerics().nvfp4_scale(decoded["weight_scale"], decoded["weight_global_scale"])
        return scale.flatten()


@dataclass(frozen=True)
class Fp8Scheme(StoredScheme):
    """E4M3 in blocks of 128x128."""

    in_batches: ClassVar[bool] = True
    in_squares: ClassVar[bool] = True

    @property
    def grid(self) -> ValueGrid:
        return E4M3

    def stored(self, shape: Shape) -> Stored:
        squares = (-(-shape[0] // 128), -(-shape[1] // 128))
        return {"weight": (("F8_E4M3",), shape), "weight_scale": (("BF16", "F32"), squares)}

    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from dsv4q.formats.stored import FP8_BLOCKS, decode

        return {**stored, "weight": decode(FP8_BLOCKS, stored)}

    def encode(self, weight: Tensor, decoded: Mapping[str, Tensor], *, keep_negative_zero: bool) -> dict[str, Tensor]:
        signed = weight if keep_negative_zero else weight + 0.0
        return {"weight": _numerics().fp8_block_encode(signed, decoded["weight_scale"])}

    def blocks(self, weight: Tensor, count: int) -> Tensor:
        """[count, 128*128], row by row; the edge is filled with zeros, which have no error."""
        import torch

        rows, columns = (-(-size // 128) for size in weight.shape)
        padding = (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0])
        filled = torch.nn.functional.pad(weight, padding)
        return filled.reshape(rows, 128, columns, 128).transpose(1, 2).reshape(count, -1)

    def impossible(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
        import torch

        nan = stored["weight"].view(torch.uint8).bitwise_and(0x7F) == 0x7F
        if bool(nan.any()):
            found = f"{int(nan.sum()):,} NaN (0x7F or 0xFF), the first at {place(nan)}"
            yield "weight", "E4M3 values without NaN", found


@dataclass(frozen=True)
class IntegerScheme(StoredScheme):
    """Symmetric integers of 4 or 8 bits, packed, per group of columns or per row."""

    @property
    def grid(self) -> ValueGrid:
        return integer_grid(self.bits)

    def stored(self, shape: Shape) -> Stored:
        out, columns = shape
        return {
            "weight_packed": (("I32",), (out, -(-columns * self.bits // 32))),
            "weight_scale": (("BF16",), (out, -(-columns // (self.columns or columns)))),
            "weight_shape": (("I64",), (2,)),
        }

    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from dsv4q.formats.stored import decode, packed_integers

        return {**stored, "weight": decode(packed_integers(self.bits, self.columns), stored)}

    def encode(self, weight: Tensor, decoded: Mapping[str, Tensor], *, keep_negative_zero: bool) -> dict[str, Tensor]:
        columns = self.columns or weight.shape[-1]
        return {"weight_packed": _numerics().int_group_encode(weight, decoded["weight_scale"], self.bits, columns)}

    def impossible(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
        yield from another_shape(stored, shape)
        used = shape[1] * self.bits % 32
        if used and bool((stored["weight_packed"][:, -1] >> used != 0).any()):
            yield "weight_packed", "zero bits after the last column", "other bits"


def closed_scheme(group: str, kind: str, bits: int, columns: int | None, input_scale: bool) -> StoredScheme:
    """A scheme of NVFP4, FP8 or INT, in closed form."""
    made: dict[str, type[Nvfp4Scheme] | type[Fp8Scheme] | type[IntegerScheme]]
    made = {NVFP4: Nvfp4Scheme, FP8: Fp8Scheme, INT: IntegerScheme}
    return made[kind](group, kind, bits, columns, input_scale)


def place(mask: Tensor) -> list[int]:
    """Index of the first true element."""
    first: list[int] = mask.nonzero()[0].tolist()
    return first


def _numerics() -> ModuleType:
    """`formats.encode`, which imports torch: headers are judged without it."""
    from dsv4q.formats import encode

    return encode


def another_shape(stored: Mapping[str, Tensor], shape: Shape) -> Iterator[Fault]:
    """Whether a linear [out, in] says of itself that it has another shape."""
    found = stored["weight_shape"].tolist()
    if found != list(shape):
        yield "weight_shape", str(list(shape)), str(found)


def none_may(suffix: str, mask: Tensor, expected: str, kind: str) -> Iterator[Fault]:
    """What is wrong with the values that `mask` marks."""
    if bool(mask.any()):
        yield suffix, expected, f"{int(mask.sum()):,} of {mask.numel():,} are {kind}, the first at {place(mask)}"
