"""The routed experts of a block as two stacked tensors, and their forward over all of them at once.

Stock llmcompressor calls 3 linears for each of E experts, each with an observer's hook. Here the weights of a block lie
in one piece, the input that w1 and w3 share is observed once, and w2 sees only the tokens that the router sent it, for
nothing else of its output is used. The products are the same ones, so are the bits.

Shape letters: E experts, F moe_intermediate_size, D hidden_size, N tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dsv4q.formats.kernels import swiglu, swiglu_parts
from dsv4q.model.routed import Routed
from dsv4q.model.upstream import experts_forward
from dsv4q.run.memory import ExpertMemory
from dsv4q.run.ranks import Ranks


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
        experts, device = self.memory.experts, self.memory.device
        self.input_ends, self.hidden_ends = (_no_ends(experts, device).to(torch.bfloat16) for _ in range(2))
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)

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
        routed = Routed.of(top_k_index, self.memory.experts)
        self.counts += routed.counts
        made = hidden_states.new_empty(top_k_index.numel(), hidden_states.shape[1])
        ends = torch.stack([_no_ends(self.memory.experts, made.device)] * 2)
        if self.all_tokens:
            ends[0] = torch.stack(torch.aminmax(hidden_states)).to(torch.float32)
        most = len(hidden_states) if self.all_tokens else max(routed.sizes)
        for part in self.memory.parts():
            if not self.all_tokens and not any(routed.sizes[part]):
                continue
            gate_up, down = (self.memory.weights(stack, part).mT for stack in ("gate_up", "down"))
            width = gate_up.shape[-1]
            gate, up = (made.new_empty(most, width) for _ in range(2))
            found = _no_ends(len(gate_up), made.device)[..., None].repeat(1, 1, swiglu_parts(most * width))
            # All views of a part at once: what is left to do for each expert has to take less time than the GPU does.
            weights = zip(gate_up[:, 0].unbind(), gate_up[:, 1].unbind(), down[:, 0].unbind(), strict=True)
            own = (ends[0, part].unbind(), found.unbind())
            # Last, for it waits for the device the first time.
            choices = (routed.by_expert(of_all, part) for of_all in (routed.rows, made))
            for of_expert in zip(weights, *choices, *own, strict=True):
                self._through(hidden_states, (gate, up), *of_expert)
            ends[1, part] = torch.stack([found[:, 0].amin(-1), found[:, 1].amax(-1)], dim=-1)
        self._observe(ends.to(torch.bfloat16))
        return routed.added_up(made, top_k_weights)

    def _through(
        self,
        hidden_states: Tensor,
        buffers: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor, Tensor],
        rows: Tensor,
        out: Tensor,
        input_ends: Tensor,
        hidden_ends: Tensor,
    ) -> None:
        """Write what one expert makes of the tokens `rows` [n] to `out` [n, D].

        Args:
            buffers: two of [n or more, F], used for each expert in turn.
            weights: w1, w3 [D, F] and w2 [F, D].
            input_ends: F32 [2], written where nobody knows them yet.
            hidden_ends: F32 [2, P], see `swiglu`.
        """
        seen, (gate, up), (w1, w3, w2) = hidden_states, buffers, weights
        if not self.all_tokens:
            if not len(rows):
                return
            seen, gate, up = hidden_states[rows], gate[: len(rows)], up[: len(rows)]
            input_ends.copy_(torch.stack(torch.aminmax(seen)))
        hidden = swiglu(torch.mm(seen, w1, out=gate), torch.mm(seen, w3, out=up), self.limit, hidden_ends)
        if self.all_tokens:
            hidden = hidden.index_select(0, rows)
        if len(rows):
            torch.mm(hidden, w2, out=out)

    def _observe(self, ends: Tensor) -> None:
        """Widen what was seen so far by the ends [2, E, 2] of one batch."""
        for old, new in ((self.input_ends, ends[0]), (self.hidden_ends, ends[1])):
            torch.minimum(old[:, 0], new[:, 0], out=old[:, 0])
            torch.maximum(old[:, 1], new[:, 1], out=old[:, 1])


def _no_ends(experts: int, device: torch.device) -> Tensor:
    """F32 [E, 2] of (inf, -inf)."""
    ends = torch.full((experts, 2), float("inf"), device=device)
    ends[:, 1] = float("-inf")
    return ends
