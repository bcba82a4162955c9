"""Tokens by the experts that the router chose, and the experts' parts added up as stock adds them, token by token.

Stock calls expert after expert, each with its tokens, and adds what comes out to the tokens' rows: in BF16, so the
order of the experts is in the bits. Here all parts lie in one tensor, expert after expert, and each of a token's K
parts is added in its turn, for all tokens at once: K additions in place of one for each expert.

Shape letters: E experts, N tokens, K experts per token, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """The router's choice for N tokens, by expert, then by place among the K, then by token: stock's order.

    Attributes:
        order: I64 [K * N], of the choices [K, N] in that order.
        counts: I64 [E] on the device, tokens of each expert.
    """

    order: Tensor
    counts: Tensor
    _tokens: int

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> Routed:
        """Of I64 [N, K]; waits for no device, as `torch.bincount` would."""
        chosen = top_k_index.T.reshape(-1)
        counts = chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))
        return cls(torch.argsort(chosen, stable=True), counts, len(top_k_index))

    @cached_property
    def sizes(self) -> list[int]:
        """`counts` on the host. The first to ask waits until the device has come so far."""
        found: list[int] = self.counts.tolist()
        return found

    @cached_property
    def rows(self) -> Tensor:
        """I64 [K * N], the token of each choice."""
        return self.order % self._tokens

    def by_expert(self, choices: Tensor, experts: slice) -> tuple[Tensor, ...]:
        """Views [n, ...] for each of some experts, of something [K * N, ...] in this order."""
        start, sizes = sum(self.sizes[: experts.start]), self.sizes[experts]
        return torch.split(choices[start : start + sum(sizes)], sizes)

    def added_up(self, parts: Tensor, top_k_weights: Tensor) -> Tensor:
        """[N, D] of what the experts make of `rows`, [K * N, D], which is consumed, and their weights [N, K]."""
        parts.mul_(top_k_weights.T.reshape(-1)[self.order].unsqueeze(-1))
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        out = parts.new_zeros(self._tokens, parts.shape[1])
        for place in places.view(-1, self._tokens).sort(dim=0).values:
            out += parts[place]
        return out
