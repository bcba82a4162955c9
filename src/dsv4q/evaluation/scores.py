"""Logits of two models, token by token: likelihood of the text, divergence, agreement; and error of the streams.

Shape letters: B batch, S sequence, C hc_mult, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsv4q.evaluation.side import Side

CHUNK = 1 << 25
"""Logits that exist at once for each model: 128 MiB as F32, 259 tokens of a vocabulary of 129,280."""


@dataclass
class ResidualError:
    """How far the artifact's residual streams are from the reference's after one block."""

    block: str
    noise: float = 0.0
    signal: float = 0.0
    relative: float = 0.0
    tokens: int = 0

    def add(self, reference: Tensor, artifact: Tensor) -> None:
        """Both [B, S, C, D]."""
        true = reference.to(torch.float32).flatten(2)
        noise = (artifact.to(torch.float32).flatten(2) - true).square_().sum(dim=-1, dtype=torch.float64)
        signal = true.square_().sum(dim=-1, dtype=torch.float64)
        self.noise += float(noise.sum())
        self.signal += float(signal.sum())
        self.relative += float((noise / signal.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().sum())
        self.tokens += noise.numel()

    def as_dict(self) -> dict[str, float | str]:
        """`relative_error`: of all tokens together, |a - r| / |r|; `token_relative_error`: mean of each token's."""
        whole = (self.noise / self.signal) ** 0.5 if self.signal else 0.0
        mean = self.relative / self.tokens if self.tokens else 0.0
        return {"block": self.block, "relative_error": whole, "token_relative_error": mean}


def residual_error(block: str, reference: Side, artifact: Side) -> ResidualError:
    """Compare the streams after `block`."""
    error = ResidualError(block)
    for true, other in zip(reference.streams, artifact.streams, strict=True):
        error.add(true.to(reference.device), other.to(reference.device))
    return error


@dataclass
class Scores:
    """Sums per sample, each list element F64 [B] of one micro-batch."""

    nll: dict[str, list[Tensor]] = field(default_factory=lambda: {"reference": [], "artifact": []})
    """Negative log-likelihood of tokens 1 … S-1, in nats."""
    predicted: list[Tensor] = field(default_factory=list)
    """Tokens that are predicted: S - 1."""
    divergence: list[Tensor] = field(default_factory=list)
    """KL(reference || artifact) after tokens 0 … S-1, in nats."""
    agreed: list[Tensor] = field(default_factory=list)
    """Positions at which both have the same most likely token."""
    positions: list[Tensor] = field(default_factory=list)
    """S."""


def score(reference: Side, artifact: Side, batches: Sequence[Tensor], check_stop: Callable[[], None]) -> Scores:
    """Scores of all micro-batches; both heads are in memory. Also fills in `Side.greedy`.

    Raises:
        CalibrationError: a non-finite logit.
    """
    scores = Scores()
    for number, ids in enumerate(batches):
        check_stop()
        hidden = {side.name: side.hidden(number) for side in (reference, artifact)}
        parts = [
            _score_rows(reference, artifact, number, hidden["reference"][row], hidden["artifact"][row], ids[row])
            for row in range(len(ids))
        ]
        for side in (reference, artifact):
            scores.nll[side.name].append(torch.stack([part.nll[side.name] for part in parts]))
            side.greedy.append(torch.stack([part.greedy[side.name] for part in parts]))
        scores.divergence.append(torch.stack([part.divergence for part in parts]))
        scores.agreed.append(torch.stack([part.agreed for part in parts]))
        scores.predicted.append(torch.full((len(ids),), ids.shape[1] - 1, dtype=torch.float64))
        scores.positions.append(torch.full((len(ids),), ids.shape[1], dtype=torch.float64))
    return scores


@dataclass
class _Row:
    """One sample: F64 scalars, and I64 [S]."""

    nll: dict[str, Tensor]
    greedy: dict[str, Tensor]
    divergence: Tensor
    agreed: Tensor


def _score_rows(reference: Side, artifact: Side, number: int, true: Tensor, other: Tensor, ids: Tensor) -> _Row:
    """`true` and `other` are the inputs [S, D] of the two heads, for one sample `ids` [S]."""
    sides = (reference, artifact)
    targets = torch.cat([ids[1:], ids[:1]]).to(true.device)  # the last has none, and is not counted
    nll: dict[str, list[Tensor]] = {side.name: [] for side in sides}
    greedy: dict[str, list[Tensor]] = {side.name: [] for side in sides}
    divergence = []
    for start in range(0, len(ids), step := max(1, CHUNK // reference.dims.vocab)):
        part = slice(start, start + step)
        logs = {}
        for side, hidden in zip(sides, (true, other), strict=True):
            logits = side.model.lm_head(hidden[part]).to(torch.float32)
            side.require_finite("head", number, logits)
            greedy[side.name].append(logits.argmax(dim=-1))
            logs[side.name] = torch.log_softmax(logits, dim=-1)
            nll[side.name].append(-logs[side.name].gather(1, targets[part, None]).squeeze(1))
        gap = logs["reference"] - logs["artifact"]
        divergence.append(gap.mul_(logs["reference"].exp_()).sum(dim=-1, dtype=torch.float64))
    chosen = {name: torch.cat(found).cpu() for name, found in greedy.items()}
    return _Row(
        nll={name: torch.cat(found)[:-1].sum(dtype=torch.float64).cpu() for name, found in nll.items()},
        greedy=chosen,
        divergence=torch.cat(divergence).sum().cpu(),
        agreed=(chosen["reference"] == chosen["artifact"]).sum().to(torch.float64),
    )


def greedy_ids(head: nn.Module, hidden: Tensor, vocab: int) -> Tensor:
    """Most likely token I64 [B, S] of hidden states [B, S, D]; the logits of a few tokens exist at once."""
    rows = hidden.flatten(0, 1)
    found = [head(part).argmax(dim=-1) for part in torch.split(rows, max(1, CHUNK // vocab))]
    return torch.cat(found).reshape(hidden.shape[:-1])
