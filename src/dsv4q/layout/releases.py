"""The releases that DeepSeek published, known by their dimensions, with the totals of their files.

Tensors and bytes are those of `model.safetensors.index.json`: of Flash, Flash-0731 and Pro-0813 as published, of Base
and Pro computed from the same tables. tests/test_releases.py holds them against the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4q.layout.dims import CSA, DSPARK, HCA, MTP, SLIDING, Dims, Draft

_FLASH = Dims(
    hidden=4096, vocab=129280, layers=43, heads=64, head_dim=512, q_lora=1024, o_groups=8, o_lora=1024, experts=256,
    shared_experts=1, experts_per_token=6, moe_intermediate=2048, hc_mult=4, index_heads=64, index_head_dim=128,
    hash_layers=3, ratios=(SLIDING, SLIDING, *(CSA, HCA) * 20, CSA), draft=Draft(MTP, 1),
)  # fmt: skip
_PRO = replace(
    _FLASH, hidden=7168, layers=61, heads=128, q_lora=1536, o_groups=16, experts=384, moe_intermediate=3072,
    ratios=(HCA, HCA, *(CSA, HCA) * 29, CSA),
)  # fmt: skip


@dataclass(frozen=True)
class Release:
    """One published model, in DeepSeek's own FP8 and MXFP4."""

    name: str
    dims: Dims
    expert_dtype: str
    """`fp4` or `fp8`, as in its config.json."""
    tensors: int
    """In the files, scales counted too."""
    nbytes: int
    """Of these tensors."""


RELEASES = (
    Release("DeepSeek-V4-Flash", _FLASH, "fp4", 69_187, 159_609_485_896),
    Release("DeepSeek-V4-Flash-Base", _FLASH, "fp8", 69_187, 292_555_345_480),
    Release("DeepSeek-V4-Flash-0731", replace(_FLASH, draft=Draft(DSPARK, 3, 3, 256, 5)), "fp4",
            72_317, 166_878_536_440),
    Release("DeepSeek-V4-Pro", _PRO, "fp4", 145_116, 864_704_792_696),
    Release("DeepSeek-V4-Pro-0813", replace(_PRO, draft=Draft(DSPARK, 3, 3, 512, 5)), "fp4",
            149_782, 892_727_580_904),
)  # fmt: skip


def known_release(dims: Dims, expert_dtype: str) -> Release | None:
    """The release of these dimensions, or None; a fine-tune has those of what it came from."""
    return next((r for r in RELEASES if (r.dims, r.expert_dtype) == (dims, expert_dtype)), None)
