"""One checkpoint, a block of it in memory at a time, and its residual streams.

Shape letters: B batch, S sequence, C hc_mult (residual streams), D hidden_size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv4q.checkpoint.against_layout import draft_kind
from dsv4q.checkpoint.headers import few
from dsv4q.checkpoint.native import NativeCheckpoint, as_source, is_dequantized
from dsv4q.checkpoint.source import Checkpoint, require_sound, require_weights, scan
from dsv4q.errors import CalibrationError, SourceError, command
from dsv4q.evaluation.clipping import Clipping
from dsv4q.evaluation.emulate import Quantizer, calibrated_limit, quantizer, rounds_inputs, shares_input_scale
from dsv4q.evaluation.experts import RoundedExperts
from dsv4q.evaluation.pieces import Loaded, Piece, SideTensor, pieces
from dsv4q.evaluation.rounding import Emulation
from dsv4q.layout import DSPARK, MTP, NO_DRAFT, Dims, Role, TensorSpec, source_tensors
from dsv4q.model.model import (
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    build_meta_model,
    embed,
    rebuild_rotary,
    release,
    run_block,
    set_tensor,
)
from dsv4q.model.upstream import experts_forward
from dsv4q.verify.config import judge_config
from dsv4q.verify.modelopt import as_shown, is_modelopt, name_in_files, shown_schemes
from dsv4q.verify.result import Log
from dsv4q.verify.schemes import Stored, StoredScheme

DRAFT = "mtp.0"
"""The draft that is judged. A server with one MTP layer uses it for every step; so does this for any number."""
_INPUT_SCALES = ("input_scale", "input_zero_point", "input_global_scale")


@dataclass(eq=False)
class Side:
    """One of the two checkpoints."""

    name: str
    """`reference` or `artifact`."""
    checkpoint: Checkpoint
    dims: Dims
    schemes: Mapping[str, StoredScheme]
    """How each quantized linear is stored, by upstream module name; empty for a plain or native checkpoint."""
    device: torch.device
    model: DeepseekV4ForCausalLMWithMTP
    no_draft: str | None
    """Why no draft is judged; None if one is."""
    emulation: Emulation = Emulation.KERNELS
    """Which inputs are rounded."""
    clipping: Clipping = field(default_factory=Clipping)
    """What calibrated ranges clip of them."""
    keeps_streams: bool = False
    """Residual streams wait for the next block on the device, not on the host."""
    streams: list[Tensor] = field(default_factory=list)
    """Per micro-batch, BF16 [B, S, C, D]: after the last block that was run."""
    greedy: list[Tensor] = field(default_factory=list)
    """Per micro-batch, I64 [B, S] on the host: the main model's own choice after each token."""
    _tensors: dict[str, list[SideTensor]] = field(default_factory=dict)
    _pieces: dict[str, list[Piece]] = field(default_factory=dict)
    _scales: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Input scales of the linears of the block in memory, by upstream module name; on the host."""
    _emulation: ExitStack = field(default_factory=ExitStack)
    """Takes back what `emulate_inputs` did."""

    # ------------------------------------------------------------------------------------------------ reading

    def tensors(self, block: str) -> list[SideTensor]:
        """What block `block` is made of: `embed`, `layers.L`, `head` or `mtp.0`."""
        if not self._tensors:
            for spec in source_tensors(self.dims):
                self._tensors.setdefault(spec.block, []).append(self._side_tensor(spec))
        return self._tensors[block]

    def _side_tensor(self, spec: TensorSpec) -> SideTensor:
        scheme = self.schemes.get(spec.module)
        if scheme is None or is_dequantized(self.checkpoint, spec.name):
            return SideTensor(spec, None, scheme, {spec.name.rpartition(".")[2]: spec.name})
        return SideTensor(
            spec, scheme, scheme, {suffix: f"{spec.module}.{suffix}" for suffix in scheme.stored(spec.shape)}
        )

    def pieces(self, block: str) -> list[Piece]:
        """The same as it is read; every tensor is there."""
        if block not in self._pieces:
            self._pieces[block] = pieces(self.checkpoint, self.tensors(block), self.device)
        return self._pieces[block]

    def runs(self, module: str) -> bool:
        """Whether an evaluation computes with a module: of the draft's only with those of one that is judged."""
        return not module.startswith("mtp.") or (self.no_draft is None and module.startswith(f"{DRAFT}."))

    def rounds(self, module: str) -> bool:
        """Whether inputs of a quantized linear are rounded here."""
        scheme = self.schemes[module]
        return self.runs(module) and self.emulation.rounds(scheme) and rounds_inputs(scheme)

    def install(self, piece: Piece, loaded: Loaded) -> None:
        """Put tensors into the model, decoded as the kernels see them."""
        for number, (tensor, weight) in enumerate(zip(piece.tensors, piece.decoded(loaded), strict=True)):
            set_tensor(self.model, tensor.spec.hf_name, weight)
            if tensor.scheme is not None:
                scales = {suffix: loaded[suffix][0][number] for suffix in _INPUT_SCALES if suffix in loaded}
                self._scales[tensor.spec.module] = scales

    def emulate_inputs(self, block: str) -> None:
        """From here to `release`, round the inputs of the block's quantized linears as the kernels do.

        Raises:
            SourceError: an input global scale that is not positive and finite.
        """
        linears = [p for p in self.tensors(block) if p.inputs is not None]
        shared: dict[str, list[Tensor]] = defaultdict(list)
        for piece in linears:
            scale = self._scales.get(piece.spec.module, {}).get("input_global_scale")
            if scale is not None:
                _check_scale(f"{piece.spec.module}.input_global_scale", scale)
                shared[shares_input_scale(piece.spec)].append(scale.reshape(1))
        divisors = {group: torch.cat(scales).amin().reshape(1).to(self.device) for group, scales in shared.items()}
        for piece in linears:
            rounding = self._rounding(piece, divisors)
            if rounding is not None:
                module = self.model.get_submodule(piece.spec.hf_name.removesuffix(".weight"))
                self._emulation.callback(module.register_forward_pre_hook(_rounded(rounding)).remove)
        self._batch_experts(block, divisors)

    def _rounding(self, tensor: SideTensor, divisors: Mapping[str, Tensor]) -> Quantizer | None:
        """What happens to the inputs of a linear; `divisors` are the global scales of the block by group."""
        scheme = tensor.inputs
        if scheme is None or not self.emulation.rounds(scheme):
            return None
        scales = self._scales[tensor.spec.module] if scheme.input_arguments is not None else {}
        scales = {suffix: scale.to(self.device) for suffix, scale in scales.items()}
        divisor = divisors.get(shares_input_scale(tensor.spec))
        rounding = quantizer(scheme, scales, divisor)
        limit = calibrated_limit(scheme, scales, divisor)
        return rounding if rounding is None or limit is None else self.clipping.watched(tensor.spec, limit, rounding)

    def _batch_experts(self, block: str, divisors: Mapping[str, Tensor]) -> None:
        """Let the routed experts of a block compute all at once, where their kernel is written down here."""
        routed = [tensor for tensor in self.tensors(block) if tensor.spec.role == Role.ROUTED_EXPERT]
        schemes = {id(tensor.inputs): tensor.inputs for tensor in routed}
        if len(schemes) != 1:
            return
        (scheme,) = schemes.values()
        if scheme is not None and scheme.input_arguments is not None:
            return
        weights: dict[str, list[Tensor]] = defaultdict(list)
        roundings: dict[str, Quantizer | None] = {}
        for tensor in sorted(routed, key=lambda tensor: tensor.spec.expert or 0):
            projection = tensor.spec.module.rpartition(".")[2]
            weights[projection].append(self.model.get_parameter(tensor.spec.hf_name))
            if projection not in roundings:
                roundings[projection] = self._rounding(tensor, divisors)
        forward = RoundedExperts(
            **weights, limit=float(self.model.config.swiglu_limit),
            round_input=roundings["w1"], round_hidden=roundings["w2"],
        )  # fmt: skip
        (layer,) = self._modules(block)
        self._emulation.enter_context(experts_forward(layer.get_submodule("mlp.experts"), forward))

    def release(self, *blocks: str) -> None:
        """Give back the memory of blocks."""
        self._emulation.close()
        self._scales.clear()
        for block in blocks:
            for module in self._modules(block):
                release(module)

    def _modules(self, block: str) -> list[nn.Module]:
        kind, _, index = block.partition(".")
        main = self.model.model
        if kind == "layers":
            return [main.layers[int(index)]]
        if kind == "mtp":
            return [self.model.mtp[int(index)]]
        return [main.embed_tokens] if kind == "embed" else [main.hc_head, main.norm, self.model.lm_head]

    # ------------------------------------------------------------------------------------------------ computing

    def run(self, block: str, batches: Sequence[Tensor], check_stop: Callable[[], None]) -> None:
        """Send every micro-batch through `embed` or `layers.L`, which is in memory.

        Raises:
            CalibrationError: non-finite residual streams.
        """
        for number, ids in enumerate(batches):
            check_stop()
            ids = ids.to(self.device)
            if block == "embed":
                out = embed(self.model, ids)
                self.streams.append(self._waiting(out))
            else:
                inputs = block_inputs(self.model, ids)
                streams = self.streams[number].to(self.device)
                out = run_block(self.model, int(block.removeprefix("layers.")), streams, ids, inputs)
                self.streams[number] = self._waiting(out, self.streams[number])
            self.require_finite(block, number, out)

    def _waiting(self, streams: Tensor, there: Tensor | None = None) -> Tensor:
        """Streams of a micro-batch where they wait; `there` is the memory of those before, which are not needed."""
        if self.keeps_streams or self.device.type == "cpu":
            return streams
        if there is None:
            there = torch.empty(streams.shape, dtype=streams.dtype, pin_memory=True)
        return there.copy_(streams)

    def hidden(self, number: int) -> Tensor:
        """BF16 [B, S, D]: what the head multiplies, of micro-batch `number`; `head` is in memory."""
        main = self.model.model
        out: Tensor = main.norm(main.hc_head(self.streams[number].to(self.device)))
        return out

    def require_finite(self, block: str, number: int, values: Tensor) -> None:
        """Refuse NaN and Inf in what `block` computed of micro-batch `number`, and name a weight that explains them.

        Raises:
            CalibrationError: there are some.
        """
        if bool(torch.isfinite(values).all()):
            return
        culprit = next(self._spoiled(block), None)
        raise CalibrationError(
            f"The values of the {self.name} became non-finite",
            where=f"{self.checkpoint.root}: {block}, micro-batch {number}",
            expected="finite values after every block",
            found=f"{int((~torch.isfinite(values)).sum()):,} of {values.numel():,} values are NaN or Inf"
            + (f"; so is {culprit}" if culprit else ""),
            hint="dsv4q verify-shards --deep finds damaged tensors",
        )

    def _spoiled(self, block: str) -> Iterator[str]:
        for piece in self.tensors(block):
            path, _, leaf = piece.spec.hf_name.rpartition(".")
            owner = self.model.get_submodule(path)
            tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield piece.spec.name


def _rounded(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, args: (rounding(args[0]), *args[1:])


def _check_scale(name: str, scale: Tensor) -> None:
    value = float(scale.reshape(-1)[0])
    if scale.numel() != 1 or not 0 < value < float("inf"):
        raise SourceError(
            "An input scale is not positive and finite",
            where=name,
            expected="one number above zero",
            found=f"{value}" if scale.numel() == 1 else list(scale.shape),
            hint="dsv4q verify-shards --deep names all of them",
        )


# ------------------------------------------------------------------------------------------------ opening


def open_side(name: str, path: Path, device: torch.device, emulation: Emulation = Emulation.KERNELS) -> Side:
    """Open a checkpoint of any form: BF16, native, or an artifact in compressed-tensors' or ModelOpt's layout.

    Raises:
        SourceError: it is damaged, has no weights, lacks tensors, or its quantization_config cannot be read.
    """
    there = scan(path)
    is_export = is_modelopt(there.config, there.tensors)
    checkpoint = require_sound(as_shown(there) if is_export else as_source(there), path)
    require_weights(checkpoint)
    dims = Dims.from_config(checkpoint.config, checkpoint.config_file)
    schemes, log = (shown_schemes(checkpoint, dims), Log()) if is_export else _schemes(checkpoint, dims)
    model = build_meta_model(checkpoint.config, str(path))
    rebuild_rotary(model, device)
    side = Side(name, checkpoint, dims, schemes, device, model, _why_no_draft(checkpoint, dims), emulation)
    _require_tensors(side, log)
    return side


def _schemes(checkpoint: Checkpoint, dims: Dims) -> tuple[dict[str, StoredScheme], Log]:
    log = Log()
    settings = checkpoint.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return {}, log
    schemes = judge_config(checkpoint.config, dims, source_tensors(dims), log)
    if not schemes:
        raise SourceError(
            "The quantization_config says of no linear how it is stored",
            where=checkpoint.config_file,
            found=log.differences[0].text() if log.differences else "no target matches",
            hint=f"{command('dsv4q', 'verify-shards', checkpoint.root)} names everything that is wrong",
        )
    return schemes, log


def _why_no_draft(checkpoint: Checkpoint, dims: Dims) -> str | None:
    kind = draft_kind(checkpoint.tensors)
    if kind == NO_DRAFT:
        return "no mtp.* tensors"
    if kind == DSPARK:
        return "the acceptance of a DSpark draft is not computed offline"
    if kind != MTP:
        return "mtp.* tensors that are no MTP block"
    return None if dims.draft.stages else "config.json has num_nextn_predict_layers 0"


def _require_tensors(side: Side, log: Log) -> None:
    """Every tensor that will be read is there, with the dtype and shape that it must have."""
    blocks = ["embed", *(f"layers.{i}" for i in range(side.dims.layers)), "head"]
    wrong: list[str] = []
    for block in blocks if side.no_draft else [*blocks, DRAFT]:
        wrong += [fault for tensor in side.tensors(block) for fault in _faults(side.checkpoint, tensor)]
    if not wrong:
        return
    about = f"; {log.differences[0].text()}" if log.differences else ""
    raise SourceError(
        f"The {side.name} is not a whole checkpoint of its config.json",
        where=side.checkpoint.root,
        expected="every tensor of the model, as config.json describes it",
        found=f"{len(wrong):,} are not: {few(wrong)}{about}",
        hint=f"{command('dsv4q', 'verify-shards', side.checkpoint.root)} names them all",
    )


def _faults(checkpoint: Checkpoint, tensor: SideTensor) -> Iterator[str]:
    spec = tensor.spec
    wanted: Stored = {spec.name: ((spec.dtype,), spec.shape)}
    if tensor.scheme is not None:
        wanted = {f"{spec.module}.{suffix}": how for suffix, how in tensor.scheme.stored(spec.shape).items()}
    for name, (dtypes, shape) in wanted.items():
        entry, named = checkpoint.tensors.get(name), name_in_files(checkpoint, name)
        if entry is None:
            yield f"{named} is missing"
        elif entry.dtype not in dtypes or entry.shape != shape:
            yield f"{named} is {entry.dtype} {list(entry.shape)} instead of {' or '.join(dtypes)} {list(shape)}"


def form_of(side: Side) -> str:
    """`bf16`, `native`, `modelopt`, or the formats of a quantized artifact."""
    if isinstance(side.checkpoint, NativeCheckpoint) and side.schemes:
        return "modelopt"
    if side.schemes:
        return ", ".join(sorted({scheme.format for scheme in side.schemes.values()}))
    return "native" if isinstance(side.checkpoint, NativeCheckpoint) else "bf16"


def require_alike(reference: Side, artifact: Side) -> None:
    """Two forms of one model, MTP aside.

    Raises:
        SourceError: vocabularies or other dimensions differ.
    """
    ours, theirs = reference.dims, artifact.dims
    for field_name in (name for name in Dims.__dataclass_fields__ if name != "draft"):
        mine, other = getattr(ours, field_name), getattr(theirs, field_name)
        if mine != other:
            what = "have different vocabularies" if field_name == "vocab" else "are not forms of one model"
            raise SourceError(
                f"The two checkpoints {what}",
                where=f"{artifact.checkpoint.config_file}: {field_name}",
                expected=f"{mine}, as in {reference.checkpoint.config_file}",
                found=other,
                hint="compare an artifact with the checkpoint that it was made from",
            )
