"""What a run needs at most: host and GPU memory, disk, residual streams; from the shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dsv4q.checkpoint.shards import PlannedShard
from dsv4q.checkpoint.writer import WRITE_BEHIND
from dsv4q.config import Config
from dsv4q.layout import Dims, TensorSpec

RUNTIME_BYTES = 1_500_000_000
"""Python, torch, llmcompressor and the meta-device model; measured, see docs/log.md."""

READ_AHEAD = 4_000_000_000
"""Bytes read before they are needed, at most; a block at most where blocks are smaller."""

ENCODE_BYTES = 2_000_000_000
"""On a GPU: temporaries of the encoder, and what waits to be copied to the host."""

STREAMS_ON_GPU = 2_500_000_000
"""Residual streams of all samples up to this size stay on the GPU between two blocks."""

STREAMS_IN_MEMORY = 12_000_000_000
"""Larger ones are kept on the host, and beyond this on disk, micro-batch by micro-batch."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that the run needs at most."""

    host: int
    read_ahead: int
    """Part of `host`: what the reader may hold before it is needed."""
    gpu: int
    gpu_ahead: int
    """With the next block on the GPU while one is worked on; done where there is room."""
    disk: int
    streams: int
    """Residual streams of all calibration tokens."""
    calibration_tokens: int
    micro_batches: int
    """That the calibration tokens make."""

    @property
    def streams_kept(self) -> str:
        """Where the residual streams are kept between two blocks when a GPU is used."""
        if self.streams > STREAMS_IN_MEMORY:
            return "on disk"
        return "in host memory" if self.streams > STREAMS_ON_GPU else "on the GPU"


def estimate(specs: list[TensorSpec], shards: tuple[PlannedShard, ...], config: Config, dims: Dims) -> Estimate:
    """Upper bounds from the shapes alone; docs/log.md has what runs really took."""
    read: Counter[str] = Counter()
    for spec in specs:
        read[spec.block] += spec.nbytes
    written: Counter[str] = Counter()
    for shard in shards:
        for tensor in shard.tensors:
            written[tensor.block] += tensor.nbytes
    main = [block for block in read if block.startswith("layers.")]
    block = max(read[b] + written[b] for b in main)
    largest = max(s.nbytes for s in specs)
    tokens = config.calibration.tokens if config.calibration and config.needs_data else 0
    streams = tokens * dims.hc_mult * dims.hidden * 2
    batch, micro_batches = 0, 0
    if tokens and config.calibration:
        micro_batches = -(-config.calibration.samples // config.calibration.micro_batch)
        rows = config.calibration.micro_batch * config.calibration.max_length
        scores = config.calibration.micro_batch * dims.heads * config.calibration.max_length**2
        wide = max(dims.heads * dims.head_dim, 4 * dims.moe_intermediate, 4 * dims.hc_mult * dims.hidden)
        batch = 6 * (rows * wide + 2 * scores)
    spilled = streams > STREAMS_IN_MEMORY
    on_gpu = 2 * streams if streams <= STREAMS_ON_GPU else 0
    ahead_on_gpu = max(read[b] for b in main)
    gpu = ahead_on_gpu + batch + min(ENCODE_BYTES, block) + largest + on_gpu
    disk = sum(s.nbytes for s in shards) + (3 if spilled else 2) * streams
    ahead = min(READ_AHEAD, max(read[b] for b in main))
    behind = min(WRITE_BEHIND, max(written[b] for b in main))
    held = 4 * streams // max(1, micro_batches) if spilled else 2 * streams
    host = RUNTIME_BYTES + block + held + batch + largest + ahead + behind
    return Estimate(
        host=host, read_ahead=ahead, gpu=gpu, gpu_ahead=gpu + ahead_on_gpu, disk=disk, streams=streams,
        calibration_tokens=tokens, micro_batches=micro_batches,
    )  # fmt: skip
