"""Drafts that are mixed, cut, or of another kind than config.json says: each is one named error of the real command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from artifact_maker import edit, edit_json, read
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import RANDOM, ToyConfig, with_draft, write_toy
from test_bad_input import TOY, assert_refused

FORMS = {"native": native_form(), "bf16": RANDOM}
KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
RATIOS = ToyConfig().compress_ratios
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy of each kind of draft and layout: `dspark-native`, …."""
    folder = tmp_path_factory.mktemp("drafts")
    for kind in ("dspark", "mtp"):
        for name, form in FORMS.items():
            write_toy(folder / f"{kind}-{name}", with_draft(ToyConfig(), kind), form=form)
    return folder


def planted(name: str, width: int = 256) -> Spoil:
    """Add a BF16 vector."""
    return lambda source: edit(source, {name: torch.ones(width, dtype=torch.bfloat16)})


def without(*beginnings: str) -> Spoil:
    return lambda source: edit(source, {name: None for name in read(source) if name.startswith(beginnings)})


def once_more(stage: int, new: int) -> Spoil:
    """A stage once more under another number."""
    old = f"mtp.{stage}."
    return lambda source: edit(
        source, {n.replace(old, f"mtp.{new}."): t for n, t in read(source).items() if n.startswith(old)}
    )


def config(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda source: edit_json(source, "config.json", change)  # type: ignore[arg-type]


def of_mtp(config: dict[str, Any]) -> None:
    """What config.json of the same model with MTP says."""
    for key in KEYS:
        del config[key]
    config["compress_ratios"] = config["compress_ratios"][: config["num_hidden_layers"] + 1]


def of_dspark(config: dict[str, Any]) -> None:
    ratios = [*config["compress_ratios"][: config["num_hidden_layers"]], 0, 0, 0]
    config.update(dict(zip(KEYS, (5, 2, [2, 3, 4], 32), strict=True)), compress_ratios=ratios)


def changed(**values: Any) -> Spoil:
    return config(lambda c: c.update(values))


def dropped(key: str) -> Spoil:
    return config(lambda c: c.pop(key))


BAD: dict[str, tuple[str, Spoil, tuple[str, ...]]] = {
    "MTP's input in a DSpark draft": (
        "dspark", planted("mtp.0.enorm.weight"), ("mixes MTP and DSpark", "mtp.0.enorm.weight", "main_norm")
    ),
    "MTP's input in a later stage": ("dspark", planted("mtp.2.hnorm.weight"), ("mixes MTP and DSpark", "mtp.2.hnorm")),
    "DSpark's norm in MTP": ("mtp", planted("mtp.0.main_norm.weight"), ("mixes MTP and DSpark", "mtp.0.main_norm")),
    "DSpark's head in a stage behind MTP": (
        "mtp", planted("mtp.2.markov_head.markov_w1.weight"), ("mixes MTP and DSpark", "mtp.2.markov_head")
    ),
    "first stage missing": ("dspark", without("mtp.0."), ("mtp.0 is missing as a whole", "mtp.0.main_proj.weight")),
    "middle stage missing": ("dspark", without("mtp.1."), ("mtp.1 is missing as a whole", "45 tensors")),
    "last stage missing": ("dspark", without("mtp.2."), ("mtp.2 is missing as a whole", "52 tensors")),
    "a stage too many": ("dspark", once_more(1, 3), ("of mtp.3 are too many", "expected: no such tensor")),
    "an MTP layer too many": ("mtp", once_more(0, 1), ("of mtp.1 are too many", "expected: no such tensor")),
    "head of the draft twice": ("dspark", planted("mtp.1.norm.weight"), ("mtp.1", "too many: mtp.1.norm.weight")),
    "Markov head missing": (
        "dspark", without("mtp.2.markov_head.markov_w2"), ("mtp.2 is missing: mtp.2.markov_head.markov_w2.weight",)
    ),
    "confidence head missing": ("dspark", without("mtp.2.confidence_head"), ("missing: mtp.2.confidence_head.proj",)),
    "copy of the shared head": ("dspark", planted("mtp.0.head.weight"), ("too many: mtp.0.head.weight",)),
    "Markov head of another rank": (
        "dspark", changed(dspark_markov_rank=64), ("another shape", "[512, 64]", "[512, 32]")
    ),
    **{f"no {key}": ("dspark", dropped(key), (f"no usable {key}", "describes a DSpark draft")) for key in KEYS},
    "two targets": (
        "dspark", changed(dspark_target_layer_ids=[3, 4]), ("dspark_target_layer_ids", "one for each stage")
    ),
    "four targets": ("dspark", changed(dspark_target_layer_ids=[1, 2, 3, 4]), ("one for each stage", "found: 4")),
    "a target that is no layer": ("dspark", changed(dspark_target_layer_ids=[3, 4, 5]), ("main layers, 0 to 4",)),
    "ratios of two stages": (
        "dspark", changed(compress_ratios=[*RATIOS[:5], 0, 0]), ("dspark_target_layer_ids", "7 entries, 5 of them main")
    ),
    "ratios of four stages": ("dspark", changed(compress_ratios=[*RATIOS[:5], 0, 0, 0, 0]), ("4 main layers",)),
    "two stages throughout": (
        "dspark",
        changed(compress_ratios=[*RATIOS[:5], 0, 0], dspark_target_layer_ids=[3, 4]),
        ("3 stages: so many the consumer builds", "found: 2 stages"),
    ),
    "a DSpark draft whose config says MTP": ("dspark", config(of_mtp), ("a DSpark draft, not MTP", "without dspark_*")),
    "a DSpark draft whose config lost its keys": (
        "dspark", config(lambda c: [c.pop(key) for key in KEYS]), ("config.json: compress_ratios", "no dspark_* key")
    ),
    "MTP whose config says DSpark": ("mtp", config(of_dspark), ("is MTP, not a DSpark draft", "mtp.0.enorm.weight")),
    "MTP with one dspark key": ("mtp", changed(dspark_block_size=5), ("no usable dspark_noise_token_id",)),
    "Vision-Exp": ("dspark", changed(vision_config={}), ("DeepSeek-V4-Flash-Vision-Exp", "its vision encoder")),
    "V4.1": ("dspark", changed(model_type="deepseek_v41"), ("DeepSeek-V4.1", "another architecture", "Engram")),
    "V4.1 by its keys": ("dspark", changed(engram_layer_ids=[1]), ("DeepSeek-V4.1", "another architecture")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_a_draft_that_does_not_fit_is_refused(case: str, form: str, whole: Path, tmp_path: Path) -> None:
    kind, spoil, words = BAD[case]
    source = Path(shutil.copytree(whole / f"{kind}-{form}", tmp_path / "source"))
    spoil(source)
    assert_refused(source, tmp_path / "out", words)
    assert not (tmp_path / "out").exists()


CHOICES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "copies of the head with DSpark": ("dspark", {"shared_head_copies": True}, ("draft.shared_head_copies", "DSpark")),
    "FP8 linears beside BF16 experts": ("dspark", {"experts": "bf16", "linears": "fp8"}, ("draft.linears", "one form")),
    "FP8 linears of MTP": ("mtp", {"linears": "fp8"}, ("draft.linears", "with a DSpark draft")),
    "another form of experts": ("dspark", {"experts": "mxfp4"}, ("draft.experts", "mxfp4")),
    "a form of what is left out": ("dspark", {"keep": False, "experts": "nvfp4"}, ("contradict", "draft")),
    "a key of old configs": ("dspark", {"keep_mtp": True}, ("draft.keep_mtp",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_a_form_of_the_draft_that_cannot_be_is_refused_by_key(case: str, whole: Path, tmp_path: Path) -> None:
    kind, choice, words = CHOICES[case]
    source = Path(shutil.copytree(whole / f"{kind}-native", tmp_path / "source"))
    assert_refused(source, tmp_path / "out", words, json.loads(json.dumps({**TOY, "draft": choice})))
