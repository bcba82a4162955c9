"""DeepSeek's own layout as a source: FP8 and MXFP4 weights beside their scales, read as the BF16 they stand for.

The official release stores a linear `X` as `X.weight` and `X.scale`; the dtype of the weight says how, for each tensor
on its own (tables in `formats/native.py`):

| form  | `X.weight`              | `X.scale`                                                | which, in the release |
|-------|-------------------------|----------------------------------------------------------|-----------------------|
| MXFP4 | I8 or U8 [out, in/2]    | F8_E8M0 (or U8) [out, in/32]                             | routed experts        |
| FP8   | F8_E4M3 [out, in]       | F8_E8M0 (or U8, or F32) [ceil(out/128), ceil(in/128)]    | attention projections, shared experts, `indexer.wq_b`, `e_proj` and `h_proj` of MTP; in Base the routed experts too |
| plain | BF16, F32, I64          | none                                                     | everything else       |

DeepSeek-V4-Flash: 33,792 MXFP4, 375 FP8 and 853 plain tensors, with the scales 69,187 in the files, 159.61 GB.
Sources: https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash (headers, `inference/convert.py`), and for the F32 scales
of Base https://github.com/NVIDIA-NeMo/Automodel/issues/2034.

Everything after this module sees one checkpoint of BF16 names, shapes and bytes, whatever lies on disk.
"""  # noqa: E501 - a table

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.downloads import Holes
from dsv4q.checkpoint.headers import Findings, TensorEntry, few
from dsv4q.checkpoint.source import Checkpoint, require_sound, scan
from dsv4q.errors import SourceError
from dsv4q.layout import Dims, Role, Shape, TensorSpec, source_tensors

if TYPE_CHECKING:
    import torch

MXFP4, FP8 = "MXFP4", "FP8"
_FORMS = {"I8": MXFP4, "U8": MXFP4, "F8_E4M3": FP8}
_SCALE_DTYPES = {MXFP4: ("F8_E8M0", "U8"), FP8: ("F8_E8M0", "U8", "F32")}
_COMPRESSED = (".weight_packed", ".weight_scale")
"""Names of compressed-tensors: such a checkpoint is an artifact, and `compare_with_layout` says so."""
_WHOLE = "use the release as it was published, or a checkpoint that is dequantized as a whole"
_FOREIGN = "see whether config.json belongs to these files, or download this file again"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight as it lies on disk."""

    form: str
    """MXFP4 or FP8."""
    weight: TensorEntry
    scale: TensorEntry


@dataclass(frozen=True, kw_only=True)
class NativeCheckpoint(Checkpoint):
    """A native checkpoint as the BF16 checkpoint that it stands for.

    `tensors` are the logical ones. The `start` of a quantized one is that of its data on disk, not of `nbytes` bytes.
    """

    on_disk: Checkpoint
    """The tensors as they lie in the files."""
    quantized: Mapping[str, Quantized]
    """Logical name -> how it is stored; what is not here lies on disk as it is."""

    def read(self, name: str) -> memoryview:
        """Logical bytes of one tensor: BF16 where it is quantized on disk.

        Raises:
            SourceError: as `Checkpoint.read`.
            WeightError: as `tensor`.
        """
        if name not in self.quantized:
            return self.on_disk.read(name)
        import torch

        return self.tensor(name).view(torch.uint8).flatten().numpy().data

    def read_into(self, name: str, buffer: memoryview) -> None:
        """`read` into `buffer`: writable, contiguous, exactly the tensor's logical size.

        Raises:
            ValueError: a buffer of another size (a defect of the caller).
            SourceError, WeightError: as `read`.
        """
        if name not in self.quantized:
            return self.on_disk.read_into(name, buffer)
        if buffer.nbytes != self.tensors[name].nbytes:
            raise ValueError(f"{name} has {self.tensors[name].nbytes} bytes, the buffer {buffer.nbytes}")
        buffer.cast("B")[:] = self.read(name)
        return None

    def read_part(self, name: str, start: int, buffer: memoryview) -> None:
        """Those logical bytes that begin at byte `start`; what is quantized is dequantized as a whole for it.

        Raises:
            SourceError, WeightError: as `read`.
        """
        if name not in self.quantized:
            return self.on_disk.read_part(name, start, buffer)
        buffer[:] = self.read(name)[start : start + len(buffer)]
        return None

    def is_whole(self, name: str) -> bool:
        """Whether everything that a logical tensor lies on disk as is whole."""
        return all(self.on_disk.is_whole(entry.name) for entry in entries_of(self, name))

    def tensor(self, name: str) -> torch.Tensor:
        """One logical tensor on the CPU, in memory of its own.

        Raises:
            SourceError: as `Checkpoint.tensor`.
            WeightError: a NaN scale or value, an F32 scale that is no power of two, a value that BF16 does not hold.
        """
        if name not in self.quantized:
            return self.on_disk.tensor(name)
        return self.decoded(name, [self.on_disk.tensor(entry.name) for entry in entries_of(self, name)])

    def read_many(self, wanted: Sequence[tuple[str, memoryview]]) -> None:
        """See `Checkpoint.read_many`; raises as `read_into`."""
        self.on_disk.read_many([(name, buffer) for name, buffer in wanted if name not in self.quantized])
        for name, buffer in wanted:
            if name in self.quantized:
                self.read_into(name, buffer)

    def stored_rows(self, rows: Sequence[Sequence[str]], *, pinned: bool = False) -> list[tuple[torch.Tensor, ...]]:
        """See `Checkpoint.stored_rows`: of quantized tensors weights and scales."""
        parts = [list(zip(*(entries_of(self, name) for name in row), strict=True)) for row in rows]
        on_disk = [[entry.name for entry in part] for row in parts for part in row]
        found = iter(self.on_disk.stored_rows(on_disk, pinned=pinned))
        return [tuple(next(found)[0] for _ in row) for row in parts]

    def decoded(self, name: str, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Checkpoint.decoded`; the same bits on any device.

        Raises:
            WeightError: as `tensor`.
        """
        there = self.quantized.get(name)
        if there is None:
            return super().decoded(name, stored)
        from dsv4q.formats.native import fp8_to_bf16, mxfp4_to_bf16

        weight, scale = stored
        where = f"{name} in {there.weight.file}, {there.scale.name} in {there.scale.file}"
        return (mxfp4_to_bf16 if there.form == MXFP4 else fp8_to_bf16)(weight, scale, where)

    @property
    def on_disk_tensors(self) -> Mapping[str, TensorEntry]:
        """See `Checkpoint.on_disk_tensors`: weights and scales."""
        return self.on_disk.tensors

    @cached_property
    def holes(self) -> Holes:
        """See `Checkpoint.holes`."""
        return self.on_disk.holes

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the files; see `Checkpoint.fingerprint`."""
        return self.on_disk.fingerprint()

    def close(self) -> None:
        """Close the files; no read may be under way."""
        self.on_disk.close()


def says_native(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are in DeepSeek's own layout, or in ModelOpt's, which stands on it."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "fp8"


def open_source(path: Path) -> Checkpoint:
    """`scan_source`, then refuse a checkpoint that has any problem.

    Raises:
        SourceError: the first problem; its hint tells how many more there are.
    """
    return require_sound(scan_source(path), path)


def scan_source(path: Path) -> Checkpoint:
    """Read a checkpoint's headers and see how it is stored; see `source.scan`.

    Raises:
        SourceError: config.json absent or unreadable. Every other problem goes into `Checkpoint.problems`.
    """
    return as_source(scan(path))


def as_source(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself if none of its weights is quantized in the native way, else a `NativeCheckpoint` of it.

    A weight whose scale is missing or does not fit, packed data of a wrong width, and routed experts in several forms
    become `problems`; such tensors are then `unread`.
    """
    try:
        dims = Dims.from_config(checkpoint.config, checkpoint.config_file)
    except SourceError:
        return checkpoint  # no layout to compare with; whoever plans says why
    there = checkpoint.tensors
    specs = [s for s in source_tensors(dims) if len(s.shape) == 2 and s.name.endswith(".weight")]
    scales = {s.name: f"{s.module}.scale" for s in specs if f"{s.module}.scale" in there}
    low = [s for s in specs if s.name in there and there[s.name].dtype in _FORMS]
    if not (scales or low) or any(name.endswith(_COMPRESSED) for name in there):
        return checkpoint
    findings = Findings(checkpoint.root)
    _check_experts(checkpoint, specs, findings)
    quantized = {spec.name: pair for spec in low if (pair := _pair(checkpoint, spec, findings))}
    _check_lone_scales(checkpoint, scales, findings)
    consumed = {*scales.values(), *(s.name for s in low)}
    logical = {name: entry for name, entry in there.items() if name not in consumed}
    for spec in low:
        if spec.name in quantized:
            entry = quantized[spec.name].weight
            logical[spec.name] = TensorEntry(spec.name, entry.file, "BF16", spec.shape, entry.start, spec.nbytes)
    return NativeCheckpoint(
        root=checkpoint.root,
        config=checkpoint.config,
        tensors=logical,
        files=checkpoint.files,
        problems=(*checkpoint.problems, *findings.errors()),
        has_weights=checkpoint.has_weights,
        config_file=checkpoint.config_file,
        warnings=checkpoint.warnings,
        hidden={**checkpoint.hidden, **_undecided(checkpoint, [s for s in low if s.name not in quantized])},
        on_disk=checkpoint,
        quantized=quantized,
    )


def release_form(spec: TensorSpec, expert_dtype: str = "fp4") -> str | None:
    """How the release stores a tensor: MXFP4, FP8, or None where it is as in a BF16 checkpoint.

    Args:
        expert_dtype: `fp4` (DeepSeek-V4-Flash) or `fp8` (Base), as in their config.json.
    """
    if spec.role == Role.ROUTED_EXPERT:
        return MXFP4 if expert_dtype == "fp4" else FP8
    if len(spec.shape) != 2 or not spec.name.endswith(".weight"):
        return None
    linear = spec.role in (Role.ATTENTION, Role.SHARED_EXPERT, Role.DRAFT_INPUT)
    return FP8 if linear or spec.module.endswith(".indexer.wq_b") else None


def release_tensors(spec: TensorSpec, expert_dtype: str = "fp4") -> tuple[tuple[str, str, Shape], ...]:
    """Name, dtype and shape of what the release has for a tensor of the model: itself, or weight and scale.

    Base has F32 scales, the other releases E8M0.
    """
    form = release_form(spec, expert_dtype)
    if form is None:
        return ((spec.name, spec.dtype, spec.shape),)
    weight, scale = stored_shapes(form, spec.shape)
    return (
        (spec.name, "I8" if form == MXFP4 else "F8_E4M3", weight),
        (f"{spec.module}.scale", "F8_E8M0" if expert_dtype == "fp4" else "F32", scale),
    )


def stored_shapes(form: str, shape: Shape) -> tuple[Shape, Shape]:
    """Shapes of `.weight` and `.scale` of a linear [out, in] in one form."""
    rows, columns = shape
    if form == MXFP4:
        return (rows, -(-columns // 2)), (rows, -(-columns // 32))
    return shape, (-(-rows // 128), -(-columns // 128))


# ------------------------------------------------------------------------------------------------ checks


def _pair(checkpoint: Checkpoint, spec: TensorSpec, findings: Findings) -> Quantized | None:
    """Weight and scale of a quantized tensor if they fit the layout and each other; else a finding."""
    weight, name = checkpoint.tensors[spec.name], f"{spec.module}.scale"
    form = _FORMS[weight.dtype]
    shape, scale_shape = stored_shapes(form, spec.shape)
    dtypes = _SCALE_DTYPES[form]
    wanted = f"{' or '.join(dtypes)} {list(scale_shape)}"
    if weight.shape != shape or (form == MXFP4 and spec.shape[1] % 2):
        what = "Packed MXFP4 data has a wrong width" if form == MXFP4 else "An FP8 weight has a wrong shape"
        fits = f"{weight.dtype} {list(shape)}, which stands for {list(spec.shape)}"
        findings.add(what, weight.file, tensor=spec.name, expected=fits, found=_text(weight), hint=_FOREIGN)
        return None
    scale = checkpoint.tensors.get(name)
    if scale is None:
        if name not in checkpoint.unread:
            what = f"The scale tensor of {'an' if form == FP8 else 'a packed'} {form} weight is missing"
            findings.add(what, weight.file, tensor=name, expected=wanted, found=f"no such tensor, {_text(weight)}")
        return None
    if scale.shape != scale_shape:
        what = f"A scale tensor of {form} weights has a wrong shape"
        findings.add(what, scale.file, tensor=name, expected=wanted, found=_text(scale), hint=_FOREIGN)
        return None
    if scale.dtype not in dtypes:
        what = f"A scale tensor of {form} weights has a wrong dtype"
        findings.add(what, scale.file, tensor=name, expected=wanted, found=_text(scale), hint=_FOREIGN)
        return None
    return Quantized(form, weight, scale)


def _undecided(checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> dict[str, str]:
    """Weights of which no value can be told -> the shard that is to blame: the scale's, if that is unread."""
    files = {spec.name: checkpoint.tensors[spec.name].file for spec in specs}
    return {spec.name: checkpoint.hidden.get(f"{spec.module}.scale", files[spec.name]) for spec in specs}


def _text(entry: TensorEntry) -> str:
    return f"{entry.name} {entry.dtype} {list(entry.shape)}"


def _check_lone_scales(checkpoint: Checkpoint, scales: Mapping[str, str], findings: Findings) -> None:
    """A scale beside a weight that is not quantized: one of the two comes from another checkpoint."""
    for name, scale in scales.items():
        weight = checkpoint.tensors.get(name)
        if weight is not None and weight.dtype not in _FORMS:
            findings.add(
                "A weight that is not quantized has a scale tensor",
                checkpoint.tensors[scale].file,
                tensor=scale,
                expected=f"{name} as {', '.join(_FORMS)}, or no scale",
                found=_text(weight),
                hint=_WHOLE,
            )


def _check_experts(checkpoint: Checkpoint, specs: Iterable[TensorSpec], findings: Findings) -> None:
    """The routed experts of all main layers have one quantized form, and those of each MTP block have one form."""
    groups: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in specs:
        if spec.role == Role.ROUTED_EXPERT and _form(checkpoint, spec.name) is not None:
            groups[spec.block if spec.is_mtp else ""].append(spec)
    for draft, members in groups.items():
        counts = Counter(form for s in members if (form := _form(checkpoint, s.name)) is not None)
        quantized = Counter({form: count for form, count in counts.items() if form != "BF16"})
        usual = (quantized or counts).most_common(1)[0][0]
        if len(counts) > 1:
            _name_strangers(checkpoint, [s for s in members if _form(checkpoint, s.name) != usual], usual, findings)
        elif usual == "BF16" and not draft:
            findings.add_error(
                SourceError(
                    "The linears are quantized as in the native release, but the routed experts are BF16",
                    where=checkpoint.root,
                    expected="routed experts as MXFP4 (official release) or FP8 (Base)",
                    found=f"{len(members):,} experts' weights as BF16 ({few([s.name for s in members])})",
                    hint=_WHOLE,
                )
            )


def _form(checkpoint: Checkpoint, name: str) -> str | None:
    """MXFP4, FP8 or BF16; None for what is not there or is an error of its own."""
    entry = checkpoint.tensors.get(name)
    return None if entry is None else "BF16" if entry.dtype == "BF16" else _FORMS.get(entry.dtype)


def _name_strangers(checkpoint: Checkpoint, strangers: list[TensorSpec], usual: str, findings: Findings) -> None:
    """One error for the strangers of each block."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for spec in strangers:
        blocks[spec.block].append(spec.name)
    for block, names in blocks.items():
        counts = Counter(_form(checkpoint, name) for name in names)
        found = ", ".join(f"{count:,} weights as {form}" for form, count in counts.items())
        findings.add_error(
            SourceError(
                f"The routed experts of {block} mix layouts",
                where=checkpoint.root,
                expected=f"all as {usual}, as most of the checkpoint's",
                found=f"{found} ({few(names)})",
                hint=_WHOLE,
            )
        )


# ------------------------------------------------------------------------------------------------ what was found


def entries_of(checkpoint: Checkpoint, name: str) -> tuple[TensorEntry, ...]:
    """What lies in the files of one logical tensor: itself, or weight and scale; nothing if it is not there."""
    if isinstance(checkpoint, NativeCheckpoint) and name in checkpoint.quantized:
        stored = checkpoint.quantized[name]
        return stored.weight, stored.scale
    return (checkpoint.tensors[name],) if name in checkpoint.tensors else ()


def forms_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Logical tensors by the form that they are stored in: MXFP4, FP8, or their dtype."""
    quantized = checkpoint.quantized if isinstance(checkpoint, NativeCheckpoint) else {}
    forms = Counter(quantized[n].form if n in quantized else e.dtype for n, e in checkpoint.tensors.items())
    return dict(forms.most_common())


def is_dequantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor's bytes are made when it is read, instead of lying in a file."""
    return isinstance(checkpoint, NativeCheckpoint) and name in checkpoint.quantized
