"""An artifact in ModelOpt's layout, put before the judge as what it means.

The judge knows NVFP4 as compressed-tensors stores it: under other names, with divisors for multipliers. So the tensors
of quantized experts are shown to it under those names, and their scalars as reciprocals; what it finds is told in the
names of the files. Everything else must be as in the native release, byte for byte.

| ModelOpt                              | shown as                            |
|---------------------------------------|-------------------------------------|
| `weight` U8 [o, i/2]                  | `weight_packed`                     |
| `weight_scale` F8_E4M3 [o, i/16]      | `weight_scale`                      |
| `weight_scale_2`, `input_scale` F32, [] or [1] | 1/x as `weight_global_scale`, `input_global_scale` [1] |

Quantized are the routed experts of the main layers, and those of a draft whose experts the files hold so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from dsv4q.checkpoint.native import NativeCheckpoint, as_source, entries_of, release_tensors
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError, command
from dsv4q.formats.scalars import from_bytes, reciprocal, to_bytes
from dsv4q.layout import Dims, Role, Shape, TensorSpec, source_tensors
from dsv4q.verify.case import Case, Contract
from dsv4q.verify.files import Header, Headers
from dsv4q.verify.modelopt_config import judge_modelopt_config
from dsv4q.verify.result import Difference, Log
from dsv4q.verify.schemes import FP8, NVFP4, Fp8Scheme, Nvfp4Scheme, StoredScheme

_SHOWN = {
    "weight": "weight_packed", "weight_scale": "weight_scale", "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}  # fmt: skip
_STORED = {shown: stored for stored, shown in _SHOWN.items()}
_SCALARS = ("weight_global_scale", "input_global_scale")
_MARKS = ("quant_algo", "moe_quant_algo", "quantized_layers")
_METHODS = ("fp8", "modelopt", "modelopt_fp4", "modelopt_mixed")
"""Values of quant_method that such an artifact may claim; only the first loads."""


def is_modelopt(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether config.json or the files have what only ModelOpt's layout has."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
        if method not in _METHODS:
            return False
        if method != "fp8" or any(mark in quantization for mark in _MARKS):
            return True
    return any(name.endswith(".weight_scale_2") for name in names)


@dataclass(frozen=True)
class _ShownNvfp4(Nvfp4Scheme):
    """What w1 and w3 share is compared as it is stored, not as it is shown."""

    shared: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class ModelOptContract(Contract):
    """What such an artifact must be; quantized experts under the names in which they are shown."""

    told: list[Difference] = field(default_factory=list)
    """Differences that speak of the files' own names already."""

    @classmethod
    def of_headers(cls, config: Mapping[str, Any], dims: Dims, headers: Headers, root_files: Mapping[str, Any],
                   log: Log) -> ModelOptContract:  # fmt: skip
        """Check config.json, and derive from it and the layout what must be there.

        Args:
            root_files: name -> contents of the JSON files beside it that it has to agree with.
        """
        names = headers.holders.keys() | headers.index.keys()
        drafted = {name.split(".ffn.")[0] for name in names if _is_draft_scale(name)}
        judge_modelopt_config(config, dims, frozenset(drafted), root_files, log)
        scheme = _ShownNvfp4("experts", NVFP4, 4, None, input_scale=True)
        specs: dict[str, TensorSpec] = {}
        schemes: dict[str, Any] = {}
        tensors: dict[str, tuple[tuple[str, ...], Shape]] = {}
        for spec in source_tensors(dims):
            if spec.expert is not None and (not spec.is_mtp or spec.block in drafted):
                specs[spec.name], schemes[spec.module] = spec, scheme
                for suffix, stored in scheme.stored(spec.shape).items():
                    tensors[f"{spec.module}.{suffix}"] = stored
                continue
            for name, dtype, shape in release_tensors(spec):
                specs[name] = replace(spec, name=name, dtype=dtype, shape=shape)
                tensors[name] = ((dtype,), shape)
        return cls(config, dims, False, specs, schemes, {}, tensors)

    @property
    def as_stored(self) -> bool:
        """See `Contract.as_stored`."""
        return False

    @property
    def reader(self) -> type[Checkpoint]:
        """See `Contract.reader`."""
        return ShownArtifact

    def seen(self, source: Checkpoint) -> Checkpoint:
        """See `Contract.seen`: nothing is decoded but the weights that the artifact has as NVFP4."""
        if not isinstance(source, NativeCheckpoint):
            raise SourceError(
                "The source is not the native release that an artifact in ModelOpt's layout has most tensors from",
                where=source.root,
                expected="DeepSeek's own FP8 and MXFP4 weights with their scales",
                found="no weight that is stored so",
                hint="give the official release as --source",
            )
        wanted = {f"{module}.weight" for module in self.schemes}
        decoded = {name: pair for name, pair in source.quantized.items() if name in wanted}
        packed = {entry.name for name in decoded for entry in entries_of(source, name)}
        tensors = {name: entry for name, entry in source.on_disk.tensors.items() if name not in packed}
        tensors |= {name: source.tensors[name] for name in decoded}
        return replace(source, tensors=tensors, quantized=decoded)

    def finish(self, case: Case) -> None:
        """See `Contract.finish`: pairs, and the files' own names in what was found."""
        if case.deep:
            _check_pairs(case)
        own = {id(one) for one in self.told}
        case.log.differences[:] = [
            one if one.tensor is None or id(one) in own else replace(one, tensor=self._stored_name(one.tensor))
            for one in case.log.differences
        ]

    def text(self, name: str) -> str:
        """See `Contract.text`; of scalars as they are stored."""
        return "F32 []" if self._is_scalar(name) else super().text(name)

    def instead(self, name: str) -> str:
        """See `Contract.instead`."""
        module, _, suffix = name.rpartition(".")
        if suffix == "scale" and module in self.schemes:
            return "no such tensor: the consumer would load it over weight_scale in silence"
        if suffix in _STORED and module in self.schemes:
            return f"no such name; in this layout it is {module}.{_STORED[suffix]}"
        if name.startswith("mtp.") and name.endswith((".emb.tok_emb.weight", ".head.weight")):
            return "no such tensor: the consumer shares the main model's"
        if name.startswith("mtp.") and name.endswith((".weight_scale", ".weight_scale_2", ".input_scale")):
            return "no such tensor: the draft is as in the native release"
        return super().instead(name)

    def _is_scalar(self, name: str) -> bool:
        module, _, suffix = name.rpartition(".")
        return suffix in _SCALARS and module in self.schemes

    def shown(self, headers: Headers, log: Log) -> Headers:
        """See `Contract.shown`: quantized experts under the names in which they are shown.

        What lies beside them under another name is a difference, and left out.
        """
        holders: dict[str, list[Header]] = {}
        for name, found in headers.holders.items():
            module, _, suffix = name.rpartition(".")
            if module not in self.schemes:
                holders[name] = found
            elif suffix in _SHOWN:
                holders[self._shown_name(name)] = [_as_vector(header) for header in found]
            else:
                log.differs(
                    "mtp" if name.startswith("mtp.") else "tensors",
                    tensor=name, file=found[0].file, expected=self.instead(name), found=found[0].text(),
                )  # fmt: skip
        self.told[:] = log.differences
        index = {self._shown_name(name): file for name, file in headers.index.items()}
        return replace(headers, holders=holders, index=index)

    def _shown_name(self, name: str) -> str:
        module, _, suffix = name.rpartition(".")
        return f"{module}.{_SHOWN.get(suffix, suffix)}" if module in self.schemes else name

    def _stored_name(self, name: str) -> str:
        """The file's name of a tensor that is shown under another one."""
        module, _, suffix = name.rpartition(".")
        return f"{module}.{_STORED[suffix]}" if module in self.schemes and suffix in _STORED else name


def _is_draft_scale(name: str) -> bool:
    return name.startswith("mtp.") and ".ffn.experts." in name and name.endswith(".weight_scale_2")


def _as_vector(header: Header) -> Header:
    """A scalar as [1]: both load, and either may be stored."""
    return replace(header, shape=(1,)) if header.dtype == "F32" and header.shape == () else header


# ------------------------------------------------------------------------------------------------ values


class ShownArtifact(Checkpoint):
    """Reads scalars of quantized experts as the divisors that they are shown as.

    One that is no positive finite number is read as it is, for the judge to name.
    """

    def read_into(self, name: str, buffer: memoryview) -> None:
        """See `Checkpoint.read_into`."""
        super().read_into(name, buffer)
        if name.endswith(_SCALARS):
            raw = buffer.cast("B")
            inverse = reciprocal(from_bytes(raw))
            if inverse is not None:
                raw[:] = to_bytes(inverse)

    def read_many(self, wanted: Sequence[tuple[str, memoryview]]) -> None:
        """See `Checkpoint.read_many`."""
        super().read_many([(name, buffer) for name, buffer in wanted if not name.endswith(_SCALARS)])
        for name, buffer in wanted:
            if name.endswith(_SCALARS):
                self.read_into(name, buffer)

    def stored_scalar(self, name: str) -> bytes:
        """As it lies in the file."""
        raw = bytearray(4)
        super().read_into(name, memoryview(raw))
        return bytes(raw)


def as_shown(checkpoint: Checkpoint) -> NativeCheckpoint:
    """An artifact in ModelOpt's layout as the BF16 model that it stands for, but for its NVFP4 experts.

    These are under the names in which they are shown, with their scalars as divisors. What of the rest cannot be told
    becomes `problems`.

    Raises:
        SourceError: nothing in it is as in the native release.
    """
    marks = (".weight_scale", ".weight_scale_2")
    packed = {n.rpartition(".")[0] for n in checkpoint.tensors if ".ffn.experts." in n and n.endswith(marks)}
    experts, rest = {}, {}
    for name, entry in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if module in packed and suffix in _SHOWN:
            shown = f"{module}.{_SHOWN[suffix]}"
            experts[shown] = replace(entry, name=shown, shape=entry.shape or (1,))
        else:
            rest[name] = entry
    seen = as_source(replace(checkpoint, tensors=rest))
    if not isinstance(seen, NativeCheckpoint):
        raise SourceError(
            "An artifact in ModelOpt's layout has attention and shared experts as in the native release",
            where=checkpoint.root,
            expected="FP8 weights with their scales",
            found="none",
            hint=f"{command('dsv4q', 'verify-shards', checkpoint.root)} names everything that is wrong",
        )
    every = {one.name: getattr(checkpoint, one.name) for one in fields(checkpoint)} | {"tensors": {**rest, **experts}}
    return replace(seen, tensors={**seen.tensors, **experts}, on_disk=ShownArtifact(**every))


def name_in_files(checkpoint: Checkpoint, name: str) -> str:
    """The file's name of a tensor that `as_shown` shows under another one; of any other its own."""
    module, _, suffix = name.rpartition(".")
    is_shown = isinstance(checkpoint, NativeCheckpoint) and isinstance(checkpoint.on_disk, ShownArtifact)
    return f"{module}.{_STORED[suffix]}" if is_shown and ".ffn.experts." in name and suffix in _STORED else name


def shown_schemes(checkpoint: Checkpoint, dims: Dims) -> dict[str, StoredScheme]:
    """How the consumer computes what `as_shown` shows, by module: NVFP4 experts, and attention in FP8 blocks.

    Attention of the main layers as in compressed-tensors' layout; of other FP8 linears nothing is said.
    """
    experts: StoredScheme = Nvfp4Scheme("experts", NVFP4, 4, None, input_scale=True)
    attention: StoredScheme = Fp8Scheme("attention", FP8, 8, None, input_scale=False)
    schemes = {}
    for spec in source_tensors(dims):
        if f"{spec.module}.weight_packed" in checkpoint.tensors:
            schemes[spec.module] = experts
        elif spec.role == Role.ATTENTION and not spec.is_mtp and len(spec.shape) == 2:
            schemes[spec.module] = attention
    return schemes


def _check_pairs(case: Case) -> None:
    """w1 and w3 of an expert, which the consumer fuses, have the same scalars, every bit.

    Raises:
        SourceError: reading fails.
    """
    artifact = case.artifact
    assert isinstance(artifact, ShownArtifact)
    for module in (module for module in case.contract.schemes if module.endswith(".w1")):
        for suffix in _SCALARS:
            one, other = f"{module}.{suffix}", f"{module.removesuffix('w1')}w3.{suffix}"
            if one in case.sound and other in case.sound:
                case.log.looked_at("pairs")
                mine, theirs = artifact.stored_scalar(one), artifact.stored_scalar(other)
                if mine != theirs:
                    expected = f"{from_bytes(mine)!r}, as {module}.{_STORED[suffix]}"
                    case.differs("pairs", other, expected, repr(from_bytes(theirs)))
