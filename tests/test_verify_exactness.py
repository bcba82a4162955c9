"""Exact means exact: where the recipe says so and the source allows it, anything else is a difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import artifact_maker as maker
import runs
from artifact_maker import edit, read
from dsv4q.__main__ import main
from dsv4q.formats.encode import nvfp4_encode
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.exactness import Exponents, fp8_possible, have_one_window

EXPERT, WKV = "layers.1.ffn.experts.2", "layers.0.attn.wkv"
EXACT, MINMAX = "nvfp4-fp8-mtp", "nvfp4-fp8-mtp-minmax"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A toy on the grids, and what two recipes make of it."""
    folder = tmp_path_factory.mktemp("made")
    write_toy(folder / "source", ToyConfig(), seed=0, form=native_form())
    for name in (EXACT, MINMAX):
        runs.run(replace(runs.toy_job(folder, name, make=False), out=folder / name))
    return {name: folder / name for name in ("source", EXACT, MINMAX)}


def judged(capsys: pytest.CaptureFixture[str], artifact: Path, source: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), "--deep", "--source", str(source), "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)  # type: ignore[return-value]


def _one_step_down(scale: torch.Tensor) -> torch.Tensor:
    """The next smaller number of the scale's dtype."""
    bits = torch.uint8 if scale.dtype == torch.float8_e4m3fn else torch.int16
    return (scale.view(bits) - 1).view(scale.dtype)


@pytest.mark.parametrize("part", [".ffn.experts.", ".attn."])
def test_scales_one_step_down_with_the_same_codes_are_named_in_every_linear(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    artifact = maker.copy(made[EXACT], tmp_path / "a")
    scales = {n: t for n, t in read(artifact).items() if n.endswith(".weight_scale") and part in n}
    edit(artifact, {name: _one_step_down(scale) for name, scale in scales.items()})
    code, result = judged(capsys, artifact, made["source"])
    assert code == 3
    assert {d["tensor"] for d in result["differences"] if d["check"] == "exact"} >= set(scales)


def test_one_block_scale_one_step_down_is_named_with_its_place(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, name = maker.copy(made[EXACT], tmp_path / "a"), f"{EXPERT}.w2.weight_scale"
    scale = read(artifact)[name]
    scale[3, 1] = _one_step_down(scale[3, 1:2])[0]
    edit(artifact, {name: scale})
    code, result = judged(capsys, artifact, made["source"])
    (difference,) = result["differences"]
    assert (code, difference["check"], difference["tensor"]) == (3, "exact", name)
    assert difference["found"] == f"1 of {scale.numel():,} blocks are not, the first at [3, 1]"


def test_another_global_scale_under_which_nothing_is_exact_is_named(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, stored, changes = maker.copy(made[EXACT], tmp_path / "a"), read(made[EXACT]), {}
    for projection in ("w1", "w3"):
        name = f"{EXPERT}.{projection}.weight_global_scale"
        changes[name] = stored[name] * 1.03
    edit(artifact, changes)
    code, result = judged(capsys, artifact, made["source"])
    assert code == 3
    exact = {d["tensor"] for d in result["differences"] if d["check"] == "exact"}
    assert exact == {f"{EXPERT}.w1.weight_scale", f"{EXPERT}.w3.weight_scale"}


def test_an_artifact_whose_recipe_promises_nothing_is_told_what_it_could_have_been(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = judged(capsys, made[MINMAX], made["source"])
    assert (code, result["differences"]) == (0, [])
    for errors in result["errors"].values():
        assert (errors["exact"], errors["could_be_exact"]) == (0, errors["tensors"])
    with pytest.raises(SystemExit):
        main(["verify-shards", str(made[MINMAX]), "--source", str(made["source"])])
    assert "; 120 more could be under other scales; " in capsys.readouterr().out


def test_a_block_off_the_grid_excuses_no_other(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bf16"
    main_args = ["dequantize", str(made["source"]), str(folder / "source"), "--quiet"]
    with pytest.raises(SystemExit):
        main(main_args)
    name = f"{EXPERT}.w2.weight"
    weight = read(folder / "source")[name]
    weight[0, 0] *= 1.0234375
    edit(folder / "source", {name: weight})
    runs.run(runs.toy_job(folder, EXACT, make=False))
    assert judged(capsys, folder / "out", folder / "source")[1]["differences"] == []
    stored = read(folder / "out")
    scale = stored[f"{EXPERT}.w2.weight_scale"]
    scale[5, 1] = _one_step_down(scale[5, 1:2])[0]
    packed = nvfp4_encode(weight, scale, stored[f"{EXPERT}.w2.weight_global_scale"], keep_negative_zero=True)
    edit(folder / "out", {f"{EXPERT}.w2.weight_scale": scale, f"{EXPERT}.w2.weight_packed": packed})
    code, result = judged(capsys, folder / "out", folder / "source")
    found = {d["check"]: d["found"] for d in result["differences"]}
    assert code == 3
    assert found["exact"].endswith("the first at [5, 1]") and found["exact"].startswith("1 of ")


def test_a_recipe_that_is_no_yaml_is_told(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = maker.copy(made[EXACT], tmp_path / "a")
    (artifact / "recipe.yaml").write_text("{: [")
    (difference,) = judged(capsys, artifact, made["source"])[1]["differences"]
    assert (difference["check"], difference["file"], difference["expected"]) == ("files", "recipe.yaml", "YAML")


# ------------------------------------------------------------------------------------------------ what a source allows


def test_every_block_that_e2m1_can_hold_is_found_under_every_exponent_that_holds_it() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    generator = torch.Generator().manual_seed(0)
    blocks = values[torch.randint(0, 8, (200, 16), generator=generator)] * torch.exp2(
        torch.randint(-20, 20, (200, 1), generator=generator).float()
    )
    found = Exponents.of(blocks)
    for k in range(-26, 27):
        holds = (blocks * 2.0**-k).unsqueeze(-1).eq(values).any(dim=-1).all(dim=-1)
        assert torch.equal((found.lower <= k) & (k <= found.upper), holds)


def test_a_value_off_the_grid_leaves_a_block_no_exponent() -> None:
    found = Exponents.of(torch.tensor([[1.0] * 15 + [1.25], [1.0] * 16, [6.0] + [0.25] * 15]))
    assert (found.lower <= found.upper).tolist() == [False, True, False]


def test_one_window_has_eighteen_powers_of_two() -> None:
    assert have_one_window((8, -9), (0, 3))
    assert not have_one_window((9, -9))
    assert not have_one_window((0, 0), None)


def test_fp8_blocks_are_possible_where_one_power_of_two_holds_them() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    blocks = torch.stack([every * 2.0**-12, every * 2.0**7, every + 0.001])
    assert fp8_possible(blocks).tolist() == [True, True, False]
