"""The calibration pipeline that holds one block at a time, run inside an ordinary `oneshot`.

llmcompressor's recipe, modifier, observers and lifecycle do the calibrating; what is ours is where the weights
live. The model is on the meta device. For each block: read its tensors, run the calibration batches through it,
let the modifier finish its scales, compress module by module, write, back to meta. The forward passes unquantized
residual streams on, which is bit-identical to stock's sequential pipeline because that one disables quantization
during calibration too.

Shape letters: B batch, S sequence, C hc_mult, D hidden_size.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from safetensors.torch import load_file, save_file

from dsv4q.calibration.data import CalibrationData
from dsv4q.calibration.measure import Errors, decoded, tensor_bytes
from dsv4q.calibration.model import (
    BlockInputs,
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    embed,
    release,
    run_block,
    set_tensor,
)
from dsv4q.calibration.upstream import encode_module
from dsv4q.checkpoint.journal import Journal, fsync_folder
from dsv4q.checkpoint.layout import TensorSpec
from dsv4q.checkpoint.plan import Plan, PlannedTensor
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import ShardWriter
from dsv4q.errors import CalibrationError, ResumeError, WeightError

PIPELINE = "dsv4q_stream"
_GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")


@CalibrationPipeline.register(PIPELINE)
class StreamingPipeline(CalibrationPipeline):
    """Registered with llmcompressor; `oneshot(pipeline="dsv4q_stream")` ends up here."""

    @staticmethod
    def __call__(model: torch.nn.Module, dataloader: object, dataset_args: object) -> None:
        """Run the `BlockStream` that was attached to the model; it has its own batches."""
        stream = cast("BlockStream", model.block_stream)
        LifecycleCallbacks.calibration_start()
        with calibration_forward_context(model), DisableQuantization(model):
            stream.run()
        LifecycleCallbacks.calibration_end()


@dataclass
class _Stopwatch:
    """Seconds by stage of one block."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] += time.perf_counter() - begin


@dataclass
class BlockStream:
    """One run over the blocks of a plan: everything it needs, and the residual streams between two blocks."""

    model: DeepseekV4ForCausalLMWithMTP
    plan: Plan
    source: Checkpoint
    writer: ShardWriter
    journal: Journal
    data: CalibrationData | None
    device: torch.device
    advance: Callable[[str, int], None]
    """Called with the block's name and the number of source bytes done with."""
    streams: list[torch.Tensor] = field(default_factory=list)
    """Per micro-batch, BF16 [B, S, C, D] on the host: the input of the next block."""

    def run(self) -> None:
        """Every block that the journal does not know as done.

        Raises:
            WeightError: NaN or Inf in a source tensor.
            CalibrationError: non-finite residual streams, a scale that is not positive and finite.
            ResumeError: the saved residual streams are gone.
        """
        self.writer.finish_blocks(self.journal.done)
        for block in self.plan.blocks:
            tensors = self.plan.block_tensors(block)
            if block in self.journal.done:
                continue
            if not tensors and not self._is_forward(block):
                continue
            self._restore_streams(block)
            watch = _Stopwatch(device=self.device)
            record = self._run_block(block, tensors, watch)
            with watch.stage("write"):
                record["digest"] = self.writer.sync()
                self._save_streams(block)
            record["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
            self.journal.finish_block(block, record)
            self._drop_streams_before(block)
            self.writer.finish_blocks([block])

    # ------------------------------------------------------------------------------------------------ one block

    def _run_block(self, block: str, tensors: tuple[PlannedTensor, ...], watch: _Stopwatch) -> dict[str, Any]:
        specs = [s for s in self.plan.source_specs if s.block == block]
        encoded = {t.spec.name for t in tensors if t.encoded}
        kept = {t.spec.name for t in tensors if not t.encoded}
        forward = self._is_forward(block)
        for spec in specs:
            with watch.stage("read"):
                tensor = self._read(spec)
            if spec.name in kept:
                with watch.stage("write"):
                    self.writer.put(spec.name, tensor_bytes(tensor))
            if forward or spec.name in encoded:
                with watch.stage("copy"):
                    set_tensor(self.model, spec.hf_name, tensor.to(self.device))
            self.advance(block, spec.nbytes)
        for copy in (t for t in tensors if not t.encoded and t.name != t.spec.name):
            with watch.stage("write"):
                self.writer.put(copy.name, self.source.read(copy.spec.name))
        if block == "embed" and forward:
            with watch.stage("forward"):
                self.streams = [embed(self.model, ids.to(self.device)).cpu() for ids in self._batches()]
            release(self.model.model.embed_tokens)
        if block.startswith("layers."):
            return self._decoder_block(int(block.removeprefix("layers.")), specs, tensors, watch)
        return {}

    def _decoder_block(
        self, index: int, specs: list[TensorSpec], tensors: tuple[PlannedTensor, ...], watch: _Stopwatch
    ) -> dict[str, Any]:
        layer = self.model.model.layers[index]
        modules = _Modules(self.model, tensors)
        modules.prepare(self.device)
        record: dict[str, Any] = {}
        if self._is_forward(f"layers.{index}"):
            with watch.stage("forward"):
                record["tokens_per_expert"] = self._forward(index)
        with watch.stage("statistics"):
            modules.check_observed()
            LifecycleCallbacks.sequential_epoch_end(list(layer.modules()))
            record["experts_without_tokens"] = modules.settle_input_scales(self.plan.config.activations)
        record |= self._encode(modules, watch)
        with watch.stage("release"):
            release(layer)
        return record

    def _forward(self, index: int) -> list[int]:
        """Send every micro-batch through block `index`; returns how many tokens the router sent each expert."""
        counts = torch.zeros(self.plan.dims.experts, dtype=torch.int64)

        def count(_module: torch.nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
            counts.add_(torch.bincount(output[2].reshape(-1).cpu(), minlength=len(counts)))

        hook = self.model.model.layers[index].mlp.gate.register_forward_hook(count)
        try:
            for number, ids in enumerate(self._batches()):
                ids = ids.to(self.device)
                inputs = self._inputs(ids)
                out = run_block(self.model, index, self.streams[number].to(self.device), ids, inputs)
                if not bool(torch.isfinite(out).all()):
                    raise CalibrationError(
                        "The activations became non-finite while calibrating",
                        where=f"layers.{index}, micro-batch {number}",
                        expected="finite residual streams",
                        found=f"{int((~torch.isfinite(out)).sum())} of {out.numel()} values are NaN or Inf",
                        hint="the source's weights of this layer are damaged or not of this architecture",
                    )
                self.streams[number] = out.cpu()
        finally:
            hook.remove()
        return [int(n) for n in counts]

    def _inputs(self, ids: torch.Tensor) -> BlockInputs:
        return block_inputs(self.model, ids)

    def _encode(self, modules: _Modules, watch: _Stopwatch) -> dict[str, Any]:
        errors: dict[str, Errors] = defaultdict(Errors)
        scales: dict[str, list[float]] = defaultdict(list)
        for spec, module, planned in modules:
            with watch.stage("encode"):
                state = encode_module(module)
                _check_scales(spec, state)
                for suffix in _GLOBAL_SCALES:
                    if suffix in state:
                        scales[f"{spec.module.rpartition('.')[2]}.{suffix}"].append(float(state[suffix]))
            with watch.stage("measure"):
                errors[spec.role].add(spec.name, module.weight, decoded(module, state))
            for tensor in planned:
                value = state[tensor.name.removeprefix(f"{spec.module}.")]
                with watch.stage("write"):
                    self.writer.put(tensor.name, tensor_bytes(value))
            release(module)
        return {
            "errors": {role: found.as_dict() for role, found in errors.items()},
            "scales": {name: {"min": min(values), "max": max(values)} for name, values in scales.items()},
        }

    # ------------------------------------------------------------------------------------------- reading

    def _read(self, spec: TensorSpec) -> torch.Tensor:
        tensor = self.source.tensor(spec.name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = (~torch.isfinite(tensor)).reshape(-1).nonzero()
            raise WeightError(
                "A source tensor has NaN or Inf",
                where=f"{spec.name} in {self.source.tensors[spec.name].file}",
                expected="finite values",
                found=f"{len(bad)} of {tensor.numel()} values, the first at element {int(bad[0])}",
                hint="get this shard again; what is finished so far is kept, and the same command resumes",
            )
        return tensor

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return () if self.data is None else self.data.batches

    def _is_forward(self, block: str) -> bool:
        return self.data is not None and (block == "embed" or block.startswith("layers."))

    # ------------------------------------------------------------------------------- residual streams on disk

    def _streams_file(self, block: str) -> Path:
        return self.journal.folder / f"streams.{block}"

    def _save_streams(self, block: str) -> None:
        """Keep the input of the next block, so that a resume need not compute the blocks before it again."""
        if not self._is_forward(block):
            return
        path = self._streams_file(block)
        partial = path.with_name(path.name + ".partial")
        save_file({str(i): t for i, t in enumerate(self.streams)}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)

    def _restore_streams(self, block: str) -> None:
        if not self._is_forward(block) or block == "embed" or self.streams:
            return
        before = self.plan.blocks[self.plan.blocks.index(block) - 1]
        path = self._streams_file(before)
        if not path.is_file():
            raise ResumeError(
                "The saved residual streams of the unfinished run are gone",
                where=path,
                hint="start over with --no-resume",
            )
        loaded = load_file(path)
        self.streams = [loaded[str(i)] for i in range(len(loaded))]

    def _drop_streams_before(self, block: str) -> None:
        keep = self._streams_file(block)
        for path in self.journal.folder.glob("streams.*"):
            if path != keep:
                path.unlink()


class _Modules:
    """The modules of one block that get compressed, with what the plan wants of each."""

    def __init__(self, model: DeepseekV4ForCausalLMWithMTP, tensors: tuple[PlannedTensor, ...]) -> None:
        planned: dict[str, list[PlannedTensor]] = defaultdict(list)
        specs: dict[str, TensorSpec] = {}
        for tensor in tensors:
            if tensor.encoded:
                planned[tensor.spec.module].append(tensor)
                specs[tensor.spec.module] = tensor.spec
        self._items = [
            (specs[name], _linear(model, specs[name]), members)
            for name, members in planned.items()
        ]

    def __iter__(self) -> Iterator[tuple[TensorSpec, torch.nn.Linear, list[PlannedTensor]]]:
        return iter(self._items)

    def prepare(self, device: torch.device) -> None:
        """Give the quantization parameters memory: NaN until the observers fill them, so that no gap passes."""
        for _, module, _ in self._items:
            for name, parameter in module._parameters.items():
                if name == "weight" or parameter is None:
                    continue
                fresh = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                if not name.endswith("zero_point"):
                    fresh.fill_(float("nan"))
                module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=False)

    def check_observed(self) -> None:
        """Refuse non-finite input statistics: compressed-tensors would turn them into a global scale of 1.0."""
        for spec, module, _ in self._items:
            observer = getattr(module, "input_observer", None)
            if observer is None or not observer.has_statistics:
                continue
            amax = float(torch.maximum(observer.min_vals.abs(), observer.max_vals.abs()).amax())
            if not math.isfinite(amax):
                raise CalibrationError(
                    "The activations became non-finite while calibrating",
                    where=f"input of {spec.module}",
                    expected="a finite largest magnitude",
                    found=amax,
                    hint="the source's weights of this layer are damaged or not of this architecture",
                )

    def settle_input_scales(self, activations: Any) -> list[int]:
        """Apply fallback and headroom to `input_global_scale`; returns the experts that saw no token.

        An expert without tokens takes the smallest global scale, i.e. the largest amax, of its layer and projection.
        """
        unseen: set[int] = set()
        by_projection: dict[str, list[tuple[TensorSpec, torch.nn.Parameter]]] = defaultdict(list)
        for spec, module, _ in self._items:
            scale = module._parameters.get("input_global_scale")
            if scale is not None:
                by_projection[spec.module.rpartition(".")[2]].append((spec, scale))
        for projection, found in by_projection.items():
            known = [scale.detach() for _, scale in found if bool(torch.isfinite(scale).all())]
            if not known:
                raise CalibrationError(
                    "No calibration token reached any expert of a layer",
                    where=f"{found[0][0].block}, projection {projection}",
                    hint="calibrate on more tokens, or with activations: {experts: all}",
                )
            smallest = torch.stack(known).amin(dim=0)
            for spec, scale in found:
                if not bool(torch.isfinite(scale).all()):
                    if activations.fallback is None:
                        continue  # left NaN: _check_scales names it
                    scale.data.copy_(smallest)
                    unseen.add(-1 if spec.expert is None else spec.expert)
                if activations.headroom != 1.0:
                    scale.data.div_(activations.headroom)
        return sorted(unseen)


def _linear(model: torch.nn.Module, spec: TensorSpec) -> torch.nn.Linear:
    module = model.get_submodule(spec.hf_name.removesuffix(".weight"))
    assert isinstance(module, torch.nn.Linear), spec.hf_name
    return module


def _check_scales(spec: TensorSpec, state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        if not name.endswith("scale"):
            continue
        number = value.to(torch.float32)
        bad = ~(torch.isfinite(number) & (number > 0))
        if bool(bad.any()):
            raise CalibrationError(
                "A scale is not positive and finite",
                where=f"{spec.module}.{name}",
                expected="every element finite and above zero",
                found=f"{int(bad.sum())} of {number.numel()} are not, e.g. {float(number[bad][0])}",
                hint="an input scale without tokens: use activations.experts: all, or routed with a fallback",
            )
