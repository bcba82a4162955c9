"""What the MTP draft would propose at every position of a text, and how often the main model would accept it.

At position t the draft sees the main model's residual streams after token t, and token t+1; it proposes token t+2
(step 1). For step 2 it is applied again, to its own streams and its own proposal, and proposes token t+3. This is what
DeepSeek's MTP and vLLM do with one MTP layer: `positions` t and t+1, hidden streams handed on before hc_head
(vLLM `deepseek_v4_mtp.py`, `v1/spec_decode/eagle.py`). While step 2 attends to earlier positions, their keys are those
of step 1, made from the true tokens and the main model's streams; only its own key is of the proposal.

So all positions can be computed at once, without a cache: one forward over the two steps side by side [step 1, step 2],
with a mask by which an entry of step 2 sees what its position saw in step 1, and itself. It is exact because MTP has
sliding-window attention and nothing else that mixes positions.

A proposal is accepted if it is the main model's own most likely token after the same tokens. The text is given, not
generated. After step 1 the main model is known at every position. Step 2 follows the proposal of step 1, so what the
main model says next is known only where that proposal is the text's own token. Step 2 is counted where the proposal is
the text's token and was accepted.

One difference to vLLM: it blanks the embedding at position 0. That is one position a text, and DeepSeek's own code
does not.

Shape letters: B batch, S sequence, T = S - 1 positions that have a next token, C hc_mult, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4q.evaluation.metrics import estimate
from dsv4q.evaluation.scores import greedy_ids
from dsv4q.evaluation.side import DRAFT, Side
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP

COLUMNS = ("positions", "accepted", "positions_2", "accepted_2", "all_2", "same_2")


@dataclass
class Acceptance:
    """Counts of one pair of main model and draft, per sample."""

    main: str
    draft: str
    counts: list[Tensor] = field(default_factory=list)
    """Per micro-batch, F64 [B, 6] in the order of `COLUMNS`: positions of step 1 and those accepted; positions at which
    step 2 can be judged and those accepted; all positions of step 2 and those at which it names what the main model
    says after the text's own tokens."""

    def add(self, first: Tensor, second: Tensor, greedy: Tensor, ids: Tensor) -> None:
        """One micro-batch: proposals I64 [B, T] of both steps, the main model's choices and the text I64 [B, S]."""
        accepted = first == greedy[:, 1:]
        judged = accepted[:, :-1] & (first[:, :-1] == ids[:, 2:])
        same = second[:, :-1] == greedy[:, 2:]
        ones = torch.ones_like(accepted)
        columns = (ones, accepted, judged, judged & same, ones[:, :-1], same)
        self.counts.append(torch.stack([column.sum(dim=1).to(torch.float64) for column in columns], dim=1))

    @property
    def columns(self) -> Tensor:
        """F64 [samples, 6]; one row of zeros if there is no draft."""
        return torch.cat(self.counts) if self.counts else torch.zeros(1, len(COLUMNS), dtype=torch.float64)

    def as_dict(self) -> dict[str, Any]:
        """Estimates by name; every value is None if there is no draft.

        `step_1`, `step_2`: share accepted (of step 2: where step 1 was accepted). `tokens_per_step`: what one run of
        the main model yields with two drafts, 1 + a1 + a1 * a2. `step_2_any`: how often the second proposal is what
        the main model says after the text's own tokens, whether the first was right or not.
        """
        counts = self.columns
        totals = counts.sum(dim=0).tolist()
        return {
            "main": self.main,
            "draft": self.draft,
            "step_1": estimate(counts, step_1).as_dict(),
            "step_2": estimate(counts, step_2).as_dict(),
            "tokens_per_step": estimate(counts, tokens_per_step).as_dict(),
            "step_2_any": estimate(counts, lambda s: s[..., 5] / s[..., 4]).as_dict(),
            "counts": {name: int(total) for name, total in zip(COLUMNS, totals, strict=True)},
        }


def step_1(sums: Tensor) -> Tensor:
    """Share of accepted first proposals; sums F64 [..., 6]."""
    return sums[..., 1] / sums[..., 0]


def step_2(sums: Tensor) -> Tensor:
    """Share of accepted second proposals where the first was; NaN where that never happened."""
    return sums[..., 3] / sums[..., 2]


def tokens_per_step(sums: Tensor) -> Tensor:
    """1 + a1 + a1 * a2."""
    return 1 + step_1(sums) * (1 + step_2(sums))


def difference(one: Acceptance, other: Acceptance, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`one` minus `other` of one of the functions above, paired."""
    width = len(COLUMNS)
    columns = torch.cat([one.columns, other.columns], dim=1)
    return estimate(columns, lambda s: function(s[..., :width]) - function(s[..., width:])).as_dict()


def judge_draft(
    drafting: Side, mains: Sequence[Side], batches: Sequence[Tensor], check_stop: Callable[[], None]
) -> list[Acceptance]:
    """The draft of one checkpoint with the streams of each main model; its embed, head and MTP block are in memory.

    Raises:
        CalibrationError: non-finite streams of the draft.
    """
    found = []
    for main in mains:
        acceptance = Acceptance(main.name, drafting.name)
        drafting.clipping.counting = main is drafting
        for number, ids in enumerate(batches):
            check_stop()
            streams = main.streams[number].to(drafting.device)
            first, second = propose(drafting, number, streams, ids.to(drafting.device))
            acceptance.add(first.cpu(), second.cpu(), main.greedy[number], ids)
        found.append(acceptance)
    return found


def propose(drafting: Side, number: int, streams: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals I64 [B, T] of steps 1 and 2, from main streams [B, S, C, D] and the text [B, S]."""
    model, vocab = drafting.model, drafting.dims.vocab
    layer: Any = model.mtp[0]
    main, next_ids = streams[:, :-1], ids[:, 1:]
    first_streams = model.draft_streams(main, next_ids)
    drafting.require_finite(DRAFT, number, first_streams)
    first = greedy_ids(model.lm_head, layer.norm(layer.hc_head(first_streams)), vocab)
    second_streams = _second_streams(model, main, first_streams, next_ids, first)
    drafting.require_finite(DRAFT, number, second_streams)
    return first, greedy_ids(model.lm_head, layer.norm(layer.hc_head(second_streams)), vocab)


def _second_streams(
    model: DeepseekV4ForCausalLMWithMTP, main: Tensor, first_streams: Tensor, next_ids: Tensor, first: Tensor
) -> Tensor:
    """Streams [B, T, C, D] of step 2; see the module's text."""
    length = next_ids.shape[1]
    ids = torch.cat([next_ids, first], dim=1)
    here = torch.arange(length, device=ids.device)
    positions = torch.cat([here, here + 1]).unsqueeze(0)
    embedded = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb
    out: Tensor = model.mtp[0](
        torch.cat([main, first_streams], dim=1),
        embedded,
        ids,
        position_ids=positions,
        position_embeddings={
            kind: rotary(embedded, position_ids=positions, layer_type=kind) for kind in ("main", "compress")
        },
        attention_mask=_side_by_side_mask(length, model.config.sliding_window, embedded),
    )
    return out[:, length:]


def _side_by_side_mask(length: int, window: int, like: Tensor) -> Tensor:
    """Additive mask [1, 1, 2T, 2T] of the dtype of `like`.

    A query of step 1 at index i sees keys of step 1 from i - window + 1 to i. One of step 2 stands at position i + 1:
    it sees keys of step 1 from i - window + 2 to i, and its own.
    """
    here = torch.arange(length, device=like.device)
    behind = here[:, None] - here[None, :]
    first = (behind >= 0) & (behind < window)
    second = (behind >= 0) & (behind < window - 1)
    none = torch.zeros_like(first)
    own = behind == 0
    seen = torch.cat([torch.cat([first, none], dim=1), torch.cat([second, own], dim=1)])
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~seen, torch.finfo(like.dtype).min)[None, None]
