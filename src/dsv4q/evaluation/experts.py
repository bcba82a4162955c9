"""The routed experts of a block over all tokens at once, their inputs rounded as the kernels do.

In place of three linears for each expert, each with a hook. The inputs of w1 and w3 are rounded before the router's
choice multiplies them, and those of w2 all together: rounding looks at one token at a time, so the bits are the same.
The products are the same ones with the same rows; what they give is added up expert by expert, as stock does.

Shape letters: E experts, N tokens, K experts per token, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsv4q.evaluation.emulate import Quantizer
from dsv4q.formats.kernels import swiglu
from dsv4q.model.routed import Routed


@dataclass(frozen=True)
class RoundedExperts:
    """Forward of a block's routed experts, in place of `DeepseekV4Experts.forward` on separate linears.

    Args:
        w1, w3: BF16 [F, D] of each expert.
        w2: BF16 [D, F] of each expert.
        limit: swiglu_limit.
        round_input, round_hidden: what happens to the inputs of w1 and w3, and of w2; None: nothing.
    """

    w1: Sequence[Tensor]
    w2: Sequence[Tensor]
    w3: Sequence[Tensor]
    limit: float
    round_input: Quantizer | None
    round_hidden: Quantizer | None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [N, D], their experts I64 [N, K] and weights [N, K] -> [N, D]."""
        routed = Routed.of(top_k_index, len(self.w1))
        inputs = hidden_states if self.round_input is None else self.round_input(hidden_states)
        rows, sizes = inputs[routed.rows], routed.sizes
        hidden = swiglu(_products(rows, self.w1, sizes), _products(rows, self.w3, sizes), self.limit)
        if self.round_hidden is not None:
            hidden = self.round_hidden(hidden)
        return routed.added_up(_products(hidden, self.w2, sizes), top_k_weights)


def _products(rows: Tensor, weights: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Each expert's rows, `sizes` of them, times its weight; in their order."""
    parts = zip(torch.split(rows, list(sizes)), weights, strict=True)
    return torch.cat([linear(part, weight) for part, weight in parts if len(part)])
