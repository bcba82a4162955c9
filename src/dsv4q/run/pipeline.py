"""The calibration pipeline that holds one block at a time, run inside one genuine llmcompressor `oneshot`.

llmcompressor's recipe, modifier, observers and lifecycle do the calibrating; what is ours is where the weights live,
and that many are worked on at once. The way there and back: `run_oneshot` builds a model on the meta device, hangs a
`BlockLoop` on it and calls `oneshot`, which ends up in `StreamingPipeline`, which takes the loop off the model and runs
it. For each block: its tensors are read (`loader.py`), calibration tokens go through it, scales are found, its linears
encoded (`block.py`) and written (`handover.py`), and back it goes to meta. The next block is on its way to the device
meanwhile, and the one before to the disk. What nothing computes with is copied before (`copying.py`).
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import yaml

from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.pipes import Behind
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import BackgroundWriter, block_digest
from dsv4q.data.tokens import CalibrationData
from dsv4q.formats.kernels import warm_up
from dsv4q.host import gpu_memory_errors, memory_now, prompt_threads
from dsv4q.model.upstream import quiet_libraries
from dsv4q.plan.needs import GpuUse
from dsv4q.plan.plan import Plan
from dsv4q.plan.work import WorkTable
from dsv4q.run.copying import Copying
from dsv4q.run.loader import BlockTask, LoadedBlock, Loader
from dsv4q.run.memory import memory_maker
from dsv4q.run.ranks import Ranks
from dsv4q.run.residuals import ResidualStreams
from dsv4q.run.stopwatch import Stopwatch

with quiet_libraries():
    from llmcompressor import oneshot
    from llmcompressor.core import LifecycleCallbacks, reset_session
    from llmcompressor.pipelines.registry import CalibrationPipeline
    from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

    from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, build_meta_model, rebuild_rotary
    from dsv4q.run.block import BlockWorker
    from dsv4q.run.handover import Handover
    from dsv4q.run.record import BlockRecord

PIPELINE = "dsv4q_stream"


@CalibrationPipeline.register(PIPELINE)
class StreamingPipeline(CalibrationPipeline):
    """Registered with llmcompressor; `oneshot(pipeline="dsv4q_stream")` ends up here."""

    @staticmethod
    def __call__(model: torch.nn.Module, dataloader: object, dataset_args: object) -> None:
        """Run the `BlockLoop` that was attached to the model; it has its own batches."""
        loop = cast("BlockLoop", model.block_loop)
        LifecycleCallbacks.calibration_start()
        with calibration_forward_context(model), DisableQuantization(model):
            loop.run()
        LifecycleCallbacks.calibration_end()


def run_oneshot(plan: Plan, folder: Path, make_loop: Callable[[DeepseekV4ForCausalLMWithMTP], BlockLoop]) -> None:
    """Build the meta model, hand it to `oneshot` with the plan's recipe, and let `make_loop`'s loop run.

    Args:
        folder: work folder; the model's config.json goes there, for `oneshot` reads it again from disk and refuses
            a model whose config names another quantization, which a dequantized checkpoint's may well do.
    """
    settings = {key: value for key, value in plan.artifact_config.items() if key != "quantization_config"}
    # Several ranks must not write one file at once.
    home = folder / f"model.{os.getpid()}"
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    # tokenizers' threads and llmcompressor's dataset workers do not mix; it sets this itself, with a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with quiet_libraries():
        model = build_meta_model(settings, str(home), 1 if plan.experts_in_stacks else None)
        loop = make_loop(model)
        rebuild_rotary(model, loop.device)
        model.block_loop = loop
        less = (
            "free the GPU of other work, say with --gpu-memory how much of it to use, or lower calibration.micro_batch "
            "and use --no-resume; finished blocks are kept"
        )
        room = f"about {loop.gpu.nbytes if loop.gpu else 0:,} bytes free"
        try:
            with gpu_memory_errors(f"--device {loop.device}", expected=room, hint=less):
                oneshot(
                    model=model,
                    processor=object(),
                    recipe=yaml.safe_dump(plan.library_recipe()),
                    pipeline=PIPELINE,
                    moe_calibrate_all_experts=plan.config.activations.experts == "all",
                )
        finally:
            del model.block_loop
            reset_session()
    if loop.device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class BlockLoop:
    """One run over the blocks of a plan, and all that it needs."""

    model: DeepseekV4ForCausalLMWithMTP
    plan: Plan
    work: WorkTable
    source: Checkpoint
    writer: BackgroundWriter
    journal: Journal
    copying: Copying
    """Has what nothing computes with, and has begun."""
    data: CalibrationData | None
    device: torch.device
    gpu: GpuUse | None
    """How the GPU's memory is used, if the device is one."""
    ranks: Ranks
    advance: Callable[[str, int], None]
    """Called with the block's name and the number of source bytes done with."""
    check_stop: Callable[[], None]
    """Called where the run may be stopped; raises KeyboardInterrupt if it shall be."""
    _streams: ResidualStreams = field(init=False)
    _begin: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        share = self.ranks.share
        shapes = [(*ids.shape, self.plan.dims.hc_mult, self.plan.dims.hidden) for ids in self._batches]
        self._streams = ResidualStreams(
            self.journal.folder,
            self.device,
            shapes,
            share.among(len(shapes)),
            on_gpu=self.gpu is not None and self.gpu.keeps_streams,
        )

    def run(self) -> None:
        """Every block that the journal does not know as done.

        Raises:
            WeightError: NaN or Inf in a source tensor.
            CalibrationError: non-finite residual streams, a scale that is not positive and finite.
            RankError: another rank is gone, or observers need to see all batches in order.
        """
        tasks = [*self._again(), *self._todo()]
        copied = deque(self.copying.tasks)
        with prompt_threads(), Handover(self.writer, self.device) as handover, Behind(1, 1) as ahead:
            ahead.put(partial(warm_up, self.device))
            worker = self._worker(handover)
            loader = self._loader(worker)
            with loader.blocks(tasks, self.check_stop) as blocks:
                for task in tasks:
                    watch = Stopwatch(self.device)
                    block = self._next(blocks, task, watch)
                    record = worker.process(block, watch)
                    loader.release(block)
                    if task.encode:
                        if task.name != "embed":  # by the end of a layer they are copied, or the disk has no time left
                            self._finish_copied(copied, handover)
                        self._finish(task.name, record, watch, handover)
            self._finish_copied(copied, handover)

    # ---------------------------------------------------------------------------------------------- what is to be done

    def _todo(self) -> list[BlockTask]:
        """Blocks of which the artifact lacks something."""
        others = {*self.journal.done, *(task.name for task in self.copying.tasks)}
        blocks = [b for b in self.plan.blocks if b not in others and self.plan.block_tensors(b)]
        return [self._task(block, encode=True) for block in blocks]

    def _again(self) -> list[BlockTask]:
        """Finished blocks that must be computed once more, for the residual streams behind them were not saved."""
        forward = [block for block in self.plan.blocks if self.work.is_forward(block)]
        finished = [block for block in forward if block in self.journal.done]
        if self.ranks.is_leader:
            self._streams.forget_but(finished)
        self.ranks.wait_for_all()
        if len(finished) == len(forward) or not finished:
            return []
        saved = self._streams.restore(finished)
        missing = finished[finished.index(saved) + 1 :] if saved else finished
        return [self._task(block, encode=False) for block in missing]

    def _task(self, block: str, *, encode: bool) -> BlockTask:
        return BlockTask(block, self.work.blocks[block], self.ranks.share.rank, encode)

    # ------------------------------------------------------------------------------------------------ who works on it

    @property
    def _batches(self) -> tuple[torch.Tensor, ...]:
        return () if self.data is None else self.data.batches

    def _worker(self, handover: Handover) -> BlockWorker:
        # A copy to the device for every block and micro-batch would wait each time until the device has come so far.
        batches = [ids.to(self.device) for ids in self._batches]
        return BlockWorker(
            self.model, self.plan, self.work, self.source, batches, self._streams, self.device, self.ranks,
            handover, self.advance, self.check_stop,
        )  # fmt: skip

    def _loader(self, worker: BlockWorker) -> Loader:
        use = self.gpu or replace(self.plan.estimate.gpu[0], memories=1)
        experts = [spec.name for spec in self.plan.source_specs if spec.block == "layers.0" and spec.expert is not None]
        packed = self.plan.experts_packed
        return Loader(
            self.source,
            self.device,
            budget=use.read_ahead,
            memory=memory_maker(self.source, self.plan.dims, experts, self.device, packed=packed, step=use.experts),
            memories=use.memories,
            put=self.writer.put,
            advance=self.advance,
        )

    def _next(self, blocks: Iterator[LoadedBlock], task: BlockTask, watch: Stopwatch) -> LoadedBlock:
        with watch.stage("read"):
            block = next(blocks)
            assert block.task is task, f"{task.name} is wanted, {block.task.name} comes"
            block.begin()
        return block

    # ----------------------------------------------------------------------------------------------- a block is done

    def _finish_copied(self, tasks: deque[BlockTask], handover: Handover) -> None:
        """Finish what is copied, at one place among all blocks, for ranks talk to each other when they finish one."""
        while tasks:
            task, watch = tasks.popleft(), Stopwatch(self.device)
            with watch.stage("read"):
                record = BlockRecord(self.copying.done(task, self.check_stop))
            self._finish(task.name, record, watch, handover)

    def _finish(self, block: str, record: BlockRecord, watch: Stopwatch, handover: Handover) -> None:
        """Have the block made durable and written into the journal, behind the computation."""
        wanted = self.work.is_forward(block) and self.ranks.from_leader(self._streams.should_be_saved)
        save = self._streams.to_save() if wanted else None

        def on_disk(digests: Mapping[str, str], seconds: float) -> None:
            """Runs in the writer's thread while other blocks compute; the journal's line comes last."""
            if save is not None:
                save()
            spent = {**watch.seconds(), "sync": seconds, "done_at": time.monotonic() - self._begin}
            parts = self.ranks.gathered((record, dict(digests), spent), behind=True)
            if not self.ranks.is_leader:
                return
            line = BlockRecord.merged([part for part, _, _ in parts])
            for rank, (_, _, of_rank) in zip(line["ranks"], parts, strict=True):
                rank["seconds"] = {name: round(value, 4) for name, value in of_rank.items()}
            line["seconds"] = line["ranks"][0]["seconds"]
            line["memory"] = memory_now(self.device)
            line["digest"] = block_digest({name: d for _, part, _ in parts for name, d in part.items()})
            self.journal.finish_block(block, line)
            if save is not None:
                self._streams.drop_before(block, self.plan.blocks)

        handover.put(lambda: self.writer.finish(block, on_disk))
