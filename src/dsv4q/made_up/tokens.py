"""Random token ids in place of calibration data."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from dsv4q.data.spec import Calibration
from dsv4q.data.tokens import CalibrationData


def random_tokens(spec: Calibration, vocab: int, reason: str) -> CalibrationData:
    """Token ids below `vocab`, a function of the spec alone, in the micro-batches that real data would have."""
    rng = np.random.Generator(np.random.Philox(key=spec.seed))
    ids = rng.integers(0, vocab, (spec.samples, spec.max_length), dtype=np.int64)
    batches = [ids[i : i + spec.micro_batch] for i in range(0, spec.samples, spec.micro_batch)]
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{len(batch)}x{spec.max_length}:".encode())
        digest.update(batch.astype("<i8").tobytes())
    tensors = tuple(torch.from_numpy(batch.copy()) for batch in batches)
    return CalibrationData(tensors, spec.tokens, 0, digest.hexdigest(), f"random token ids, for {reason}")
