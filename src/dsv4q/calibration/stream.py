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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from safetensors.torch import load_file, save_file

from dsv4q.calibration.data import CalibrationData
from dsv4q.calibration.measure import Stopwatch, on_host, tensor_bytes
from dsv4q.calibration.model import (
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    embed,
    release,
    run_block,
    set_tensor,
)
from dsv4q.calibration.modules import GLOBAL_SCALES, BlockModules
from dsv4q.calibration.prefetch import loader, read_threads
from dsv4q.checkpoint.ahead import loaded_ahead
from dsv4q.checkpoint.journal import Journal, fsync_folder
from dsv4q.checkpoint.layout import TensorSpec
from dsv4q.checkpoint.plan import Plan, PlannedTensor
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import BackgroundWriter
from dsv4q.errors import CalibrationError, ResumeError, WeightError
from dsv4q.errorstats import Errors

PIPELINE = "dsv4q_stream"

Loaded = Iterator[tuple[TensorSpec, torch.Tensor]]
"""Source tensors on the host, in the order of the plan."""


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
class BlockStream:
    """One run over the blocks of a plan: everything it needs, and the residual streams between two blocks."""

    model: DeepseekV4ForCausalLMWithMTP
    plan: Plan
    source: Checkpoint
    writer: BackgroundWriter
    journal: Journal
    data: CalibrationData | None
    device: torch.device
    advance: Callable[[str, int], None]
    """Called with the block's name and the number of source bytes done with."""
    check_stop: Callable[[], None]
    """Called where the run may be stopped; raises KeyboardInterrupt if it shall be."""
    streams: list[torch.Tensor] = field(default_factory=list)
    """Per micro-batch, BF16 [B, S, C, D] on the host: the input of the next block."""

    def run(self) -> None:
        """Every block that the journal does not know as done.

        Raises:
            WeightError: NaN or Inf in a source tensor.
            CalibrationError: non-finite residual streams, a scale that is not positive and finite.
            ResumeError: the saved residual streams are gone.
        """
        blocks = [b for b in self.plan.blocks if b not in self.journal.done and self.plan.block_tensors(b)]
        with loaded_ahead(
            [spec for block in blocks for spec in self._specs(block)],
            loader(self.source, self.device),
            lambda spec: spec.nbytes,
            budget=self.plan.estimate.read_ahead,
            threads=read_threads(self.device),
        ) as tensors:
            for block in blocks:
                self._do(block, tensors)

    def _do(self, block: str, loaded: Loaded) -> None:
        """One block from its bytes in the source to its line in the journal."""
        self._restore_streams(block)
        watch = Stopwatch(device=self.device)
        record = self._run_block(block, loaded, watch)
        record["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        streams = list(self.streams) if self._is_forward(block) else None

        def on_disk(digest: str, seconds: float) -> None:
            """Runs in the writer's thread while the next block computes; the journal's line comes last."""
            if streams is not None:
                self._save_streams(block, streams)
            record["digest"] = digest
            record["seconds"]["sync"] = round(seconds, 4)
            self.journal.finish_block(block, record)
            self._drop_streams_before(block)

        self.writer.finish(block, on_disk)

    # ------------------------------------------------------------------------------------------------ one block

    def _specs(self, block: str) -> list[TensorSpec]:
        return [s for s in self.plan.source_specs if s.block == block]

    def _run_block(self, block: str, loaded: Loaded, watch: Stopwatch) -> dict[str, Any]:
        tensors = self.plan.block_tensors(block)
        specs = self._specs(block)
        encoded = {t.spec.name for t in tensors if t.encoded}
        kept = {t.spec.name for t in tensors if not t.encoded}
        forward = self._is_forward(block)
        for spec in specs:
            self.check_stop()
            with watch.stage("read"):
                next_spec, tensor = next(loaded)
                assert next_spec is spec, f"{spec.name} is wanted, {next_spec.name} comes"
            if spec.name in kept:
                with watch.stage("write"):
                    self.writer.put(spec.name, tensor_bytes(tensor))
            if forward or spec.name in encoded:
                with watch.stage("copy"):
                    tensor = tensor.to(self.device, non_blocking=True)
                    set_tensor(self.model, spec.hf_name, tensor)
            with watch.stage("check"):
                self._check_finite(spec, tensor)
            self.advance(block, spec.nbytes)
        for copy in (t for t in tensors if not t.encoded and t.name != t.spec.name):
            with watch.stage("write"):
                self.writer.put(copy.name, self.source.read(copy.spec.name))
        if block == "embed" and forward:
            with watch.stage("forward"):
                self.streams = [embed(self.model, ids.to(self.device)).cpu() for ids in self._batches()]
            release(self.model.model.embed_tokens)
        if block.startswith("layers."):
            return self._decoder_block(int(block.removeprefix("layers.")), tensors, watch)
        return {}

    def _decoder_block(self, index: int, tensors: tuple[PlannedTensor, ...], watch: Stopwatch) -> dict[str, Any]:
        layer = self.model.model.layers[index]
        modules = BlockModules(self.model, tensors, self.device)
        modules.prepare()
        record: dict[str, Any] = {}
        if self._is_forward(f"layers.{index}"):
            with watch.stage("forward"):
                record["tokens_per_expert"] = self._forward(index)
        with watch.stage("statistics"):
            modules.check_observed()
            modules.settle_weight_scales()
            LifecycleCallbacks.sequential_epoch_end(list(layer.modules()))
            bounds = self._input_bounds(index)
            if self.plan.config.activations.scales == "bound":
                modules.bound_input_scales(bounds)
            else:
                record["experts_without_tokens"] = modules.settle_input_scales(self.plan.config.activations)
            record["input_amax"] = {
                projection: {"used": amax, "bound": bounds[projection]}
                for projection, amax in modules.input_amax().items()
                if projection in bounds
            }
        record |= self._encode(modules, watch)
        with watch.stage("release"):
            release(layer)
        return record

    def _input_bounds(self, index: int) -> dict[str, float]:
        """Largest magnitude that the inputs of a block's routed experts can have, whatever the data.

        w1 and w3 read an RMSNorm's output, each element at most sqrt(D) times its weight; w2 reads
        silu(gate) * up with gate and |up| clamped to swiglu_limit.
        """
        norm = self.source.tensor(f"layers.{index}.ffn_norm.weight").to(torch.float32)
        wide = math.sqrt(norm.numel()) * float(norm.abs().amax())
        limit = float(self.source.config.get("swiglu_limit", 10.0))
        return {"w1": wide, "w3": wide, "w2": limit * limit}

    def _forward(self, index: int) -> list[int]:
        """Send every micro-batch through block `index`; returns how many tokens the router sent each expert."""
        counts = torch.zeros(self.plan.dims.experts, dtype=torch.int64)

        def count(_module: torch.nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
            counts.add_(torch.bincount(output[2].reshape(-1).cpu(), minlength=len(counts)))

        hook = self.model.model.layers[index].mlp.gate.register_forward_hook(count)
        try:
            for number, ids in enumerate(self._batches()):
                self.check_stop()
                ids = ids.to(self.device)
                inputs = block_inputs(self.model, ids)
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

    def _encode(self, modules: BlockModules, watch: Stopwatch) -> dict[str, Any]:
        errors: dict[str, Errors] = defaultdict(Errors)
        scales: dict[str, list[float]] = defaultdict(list)
        for batch in modules.batches():
            self.check_stop()
            with watch.stage("encode"):
                stored = batch.encode()
                batch.check_scales(stored)
            with watch.stage("measure"):
                batch.measure(stored, errors[batch.role])
            with watch.stage("write"):
                host = {name: on_host(value) for name, value in stored.items()}
                for index, member in enumerate(batch.members):
                    for tensor in member.planned:
                        value = host[tensor.name.removeprefix(f"{member.spec.module}.")][index]
                        self.writer.put(tensor.name, tensor_bytes(value))
            for suffix in (name for name in GLOBAL_SCALES if name in host):
                for member, value in zip(batch.members, host[suffix].flatten().tolist(), strict=True):
                    scales[f"{member.projection}.{suffix}"].append(value)
            for member in batch.members:
                release(member.module)
        return {
            "errors": {role: found.as_dict() for role, found in errors.items()},
            "tensors": {name: e.as_dict() for found in errors.values() for name, e in found.each.items()},
            "scales": {name: {"min": min(values), "max": max(values)} for name, values in scales.items()},
        }

    # ------------------------------------------------------------------------------------------- reading

    def _check_finite(self, spec: TensorSpec, tensor: torch.Tensor) -> None:
        """One pass on whichever device has the tensor; minimum and maximum are NaN if any element is."""
        if not tensor.is_floating_point() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
            return
        bad = (~torch.isfinite(tensor)).reshape(-1).nonzero()
        raise WeightError(
            "A source tensor has NaN or Inf",
            where=f"{spec.name} in {self.source.tensors[spec.name].file}",
            expected="finite values",
            found=f"{len(bad)} of {tensor.numel()} values, the first at element {int(bad[0])}",
            hint="get this shard again; finished blocks are kept, and the same command resumes unless the repaired "
            "file looks like another source, in which case --no-resume starts over",
        )

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return () if self.data is None else self.data.batches

    def _is_forward(self, block: str) -> bool:
        return self.data is not None and (block == "embed" or block.startswith("layers."))

    # ------------------------------------------------------------------------------- residual streams on disk

    def _streams_file(self, block: str) -> Path:
        return self.journal.folder / f"streams.{block}"

    def _save_streams(self, block: str, streams: list[torch.Tensor]) -> None:
        """Keep the input of the next block, so that a resume need not compute the blocks before it again."""
        path = self._streams_file(block)
        partial = path.with_name(path.name + ".partial")
        save_file({str(i): t for i, t in enumerate(streams)}, partial)
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
