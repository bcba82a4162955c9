"""The routed experts of a block as two stacked tensors, and their forward over all of them at once.

Stock llmcompressor calls 3 linears for each of E experts, each with an observer's hook. Here the weights of a block lie
in one piece, the input that w1 and w3 share is observed once, and w2 sees only the tokens that the router sent it, for
nothing else of its output is used. The products are the same ones, so are the bits.

Shape letters: E experts, F moe_intermediate_size, D hidden_size, N tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsv4q.formats.kernels import swiglu
from dsv4q.layout import Dims, TensorSpec
from dsv4q.model.upstream import experts_forward
from dsv4q.run.ranks import Ranks

PROJECTIONS = {"w1": ("gate_up", 0), "w3": ("gate_up", 1), "w2": ("down", 0)}
"""Projection -> stack and place in its second dimension. w1 and w3 lie side by side: they share a global scale."""


@dataclass
class ExpertMemory:
    """Memory for the routed experts of one block; block after block uses it.

    Attributes:
        gate_up: BF16 [E, 2, F, D], w1 and w3.
        down: BF16 [E, 1, D, F], w2.
        freed: the device is done with the block that was here before.
    """

    gate_up: Tensor
    down: Tensor
    freed: torch.cuda.Event | None = None

    @classmethod
    def of(cls, dims: Dims, device: torch.device) -> ExpertMemory:
        """Uninitialised memory for blocks of these dimensions."""
        shape = (dims.moe_intermediate, dims.hidden)
        return cls(
            torch.empty((dims.experts, 2, *shape), dtype=torch.bfloat16, device=device),
            torch.empty((dims.experts, 1, *reversed(shape)), dtype=torch.bfloat16, device=device),
        )

    def view(self, spec: TensorSpec) -> Tensor:
        """Where the weight of one expert's projection lies."""
        stack, place = PROJECTIONS[spec.module.rpartition(".")[2]]
        assert spec.expert is not None
        found: Tensor = getattr(self, stack)[spec.expert, place]
        return found

    def wait_until_free(self) -> None:
        """Let the current stream of the device wait for the block that was here before."""
        if self.freed is not None:
            torch.cuda.current_stream(self.gate_up.device).wait_event(self.freed)
            self.freed = None

    def ends(self, specs: Iterable[TensorSpec]) -> list[tuple[list[TensorSpec], Tensor]]:
        """Smallest and largest element [n, 2] of the experts' weights, NaN if one is NaN."""
        by_place = {PROJECTIONS[s.module.rpartition(".")[2]] + (s.expert,): s for s in specs if s.expert is not None}
        found = []
        for name, stack in (("gate_up", self.gate_up), ("down", self.down)):
            places = [(e, p) for e in range(stack.shape[0]) for p in range(stack.shape[1])]
            ends = torch.stack(torch.aminmax(stack.flatten(2).flatten(0, 1), dim=1), dim=-1)
            there = [i for i, (expert, place) in enumerate(places) if (name, place, expert) in by_place]
            found.append(([by_place[name, places[i][1], places[i][0]] for i in there], ends[there]))
        return found


class Routing(Protocol):
    """What is seen of a block's routed experts while tokens go through it."""

    counts: Tensor
    """I64 [E] on the device, tokens that the router sent to each expert."""

    def watching(self, mlp: torch.nn.Module) -> AbstractContextManager[None]:
        """Context in which the tokens that go through the block's `mlp` are seen."""

    def gather(self, ranks: Ranks) -> None:
        """Take in what the other ranks saw."""


@dataclass
class CountedRouting:
    """Counts alone; the experts compute as modules, under their observers' hooks."""

    counts: Tensor

    @contextmanager
    def watching(self, mlp: torch.nn.Module) -> Iterator[None]:
        hook = mlp.get_submodule("gate").register_forward_hook(self._count)
        try:
            yield
        finally:
            hook.remove()

    def _count(self, _module: torch.nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        self.counts.add_(torch.bincount(output[2].reshape(-1), minlength=len(self.counts)))

    def gather(self, ranks: Ranks) -> None:
        ranks.total(self.counts)


@dataclass
class BatchedExperts:
    """Forward of a block's routed experts, in place of `DeepseekV4Experts.forward` on separate linears.

    Args:
        memory: weights.
        limit: swiglu_limit.
        all_tokens: every expert sees every token, as llmcompressor's `moe_calibrate_all_experts` has it; otherwise
            only the tokens that the router sends it.

    Attributes:
        input_ends: BF16 [E, 2], smallest and largest input of w1 and w3 so far: (inf, -inf) without any, NaN if one
            was NaN.
        hidden_ends: the same for w2.
        counts: I64 [E] on the device, tokens that the router sent to each expert.
    """

    memory: ExpertMemory
    limit: float
    all_tokens: bool
    input_ends: Tensor = field(init=False)
    hidden_ends: Tensor = field(init=False)
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        weight = self.memory.gate_up
        self.input_ends, self.hidden_ends = (_no_ends(len(weight), weight.device).to(weight.dtype) for _ in range(2))
        self.counts = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)

    def watching(self, mlp: torch.nn.Module) -> AbstractContextManager[None]:
        """Context in which the block's `mlp` computes its routed experts here."""
        return experts_forward(mlp.get_submodule("experts"), self)

    def gather(self, ranks: Ranks) -> None:
        """Take in what the other ranks saw."""
        self.input_ends, self.hidden_ends = ranks.widest(torch.stack([self.input_ends, self.hidden_ends])).unbind()
        ranks.total(self.counts)

    @property
    def seen(self) -> Tensor:
        """BOOL [E]: experts that some token reached."""
        return torch.ones_like(self.counts, dtype=torch.bool) if self.all_tokens else self.counts > 0

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [N, D], their experts I64 [N, K] and weights [N, K] -> [N, D]."""
        weight = self.memory.gate_up
        experts, top_k = weight.shape[0], top_k_index.shape[1]
        # By expert, then by place among the K, then by token: the order in which the separate linears take them.
        order = torch.argsort(top_k_index.T.reshape(-1), stable=True)
        tokens, shares = order % len(top_k_index), top_k_weights.T.reshape(-1)[order].unsqueeze(-1)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=experts)
        self.counts += counts
        sizes = counts.tolist()
        assert sum(sizes) == top_k * len(top_k_index)
        parts = zip(torch.split(tokens, sizes), torch.split(shares, sizes), strict=True)
        out = torch.zeros_like(hidden_states)
        ends = torch.stack([_no_ends(experts, weight.device)] * 2)
        if self.all_tokens:
            ends[0] = torch.stack(torch.aminmax(hidden_states)).to(torch.float32)
        for expert, (rows, share) in enumerate(parts):
            seen = hidden_states if self.all_tokens else hidden_states[rows]
            if not len(seen):
                continue
            if not self.all_tokens:
                ends[0, expert] = torch.stack(torch.aminmax(seen)).to(torch.float32)
            hidden = swiglu(
                linear(seen, weight[expert, 0]), linear(seen, weight[expert, 1]), self.limit, ends[1, expert]
            )
            if self.all_tokens:
                hidden = hidden[rows]
            if len(hidden):
                part = linear(hidden, self.memory.down[expert, 0]).mul_(share)
                out.index_add_(0, rows, part)
        self._observe(ends.to(weight.dtype))
        return out

    def _observe(self, ends: Tensor) -> None:
        """Widen what was seen so far by the ends [2, E, 2] of one batch."""
        for old, new in ((self.input_ends, ends[0]), (self.hidden_ends, ends[1])):
            torch.minimum(old[:, 0], new[:, 0], out=old[:, 0])
            torch.maximum(old[:, 1], new[:, 1], out=old[:, 1])


def _no_ends(experts: int, device: torch.device) -> Tensor:
    """F32 [E, 2] of (inf, -inf)."""
    return torch.tensor([float("inf"), float("-inf")], device=device).repeat(experts, 1)
