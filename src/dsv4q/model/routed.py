"""Tokens by the experts that the router chose, and the experts' parts added up as stock adds them, token by token.

Stock calls expert after expert, each with its tokens, and adds what comes out to the tokens' rows: in BF16, so the
order of the experts is in the bits. Here all parts lie in one tensor, expert after expert, and each of a token's K
parts is added in its turn, for all tokens at once: K additions in place of one for each expert.

Shape letters: E experts, N tokens, K experts per token, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """The router's choice for N tokens, by expert, then by place among the K, then by token: stock's order.

    Attributes:
        order: I64 [K * N], of the choices [K, N] in that order.
        counts: I64 [E] on the device, tokens of each expert.
        sizes: the same on the host.
    """

    order: Tensor
    counts: Tensor
    sizes: list[int]
    _tokens: int

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> Routed:
        """Of I64 [N, K]; waits for the device."""
        chosen = top_k_index.T.reshape(-1)
        counts = torch.bincount(chosen, minlength=experts)
        return cls(torch.argsort(chosen, stable=True), counts, counts.tolist(), len(top_k_index))

    @property
    def rows(self) -> Tensor:
        """I64 [K * N], the token of each choice."""
        return self.order % self._tokens

    def added_up(self, parts: Tensor, top_k_weights: Tensor) -> Tensor:
        """[N, D] of what the experts make of `rows`, [K * N, D], which is consumed, and their weights [N, K]."""
        parts.mul_(top_k_weights.T.reshape(-1)[self.order].unsqueeze(-1))
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        out = parts.new_zeros(self._tokens, parts.shape[1])
        for place in places.view(-1, self._tokens).sort(dim=0).values:
            out += parts[place]
        return out
