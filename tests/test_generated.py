"""Made-up checkpoints: what they hold, that it hangs on seed and name alone, and that readers notice no difference."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsv4q.checkpoint.against_layout import compare_with_layout
from dsv4q.checkpoint.native import FP8, MXFP4, as_source, forms_of, release_form
from dsv4q.errors import SourceError, UsageError
from dsv4q.formats.encode import fp8_block_decode, fp8_block_encode, nvfp4_decode, nvfp4_encode
from dsv4q.formats.exact import fp8_block_scales
from dsv4q.layout import Dims, Role
from dsv4q.made_up.generated import GeneratedCheckpoint, kind_of
from dsv4q.made_up.native import native_form
from dsv4q.made_up.packed import PackedCheckpoint
from dsv4q.made_up.toy import ToyConfig

CONFIG = ToyConfig().as_config_json()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GeneratedCheckpoint:
    return generated(tmp_path_factory.mktemp("made"))


def generated(folder: Path, seed: int = 0) -> GeneratedCheckpoint:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return GeneratedCheckpoint.of(CONFIG, folder, seed)


def values(made: GeneratedCheckpoint, role: str) -> list[torch.Tensor]:
    """The tensors of a role as F32."""
    return [made.tensor(name).float() for name, spec in made.specs.items() if spec.role == role]


def test_the_tensors_are_those_of_the_layout(made: GeneratedCheckpoint) -> None:
    assert compare_with_layout(made, Dims.from_config(CONFIG)) == []


def test_every_tensor_is_finite(made: GeneratedCheckpoint) -> None:
    assert [name for name in made.tensors if not made.tensor(name).isfinite().all()] == []


def test_experts_are_e2m1_times_a_power_of_two_for_each_32_columns(made: GeneratedCheckpoint) -> None:
    for weight in values(made, Role.ROUTED_EXPERT):
        groups = weight.reshape(weight.shape[0], -1, 32)
        scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(dim=-1, keepdim=True) / 6)))
        one = torch.ones(1)
        codes = nvfp4_encode(
            (groups / scale).reshape_as(weight), torch.ones(weight.shape[0], weight.shape[1] // 16), one
        )
        ones = torch.ones(weight.shape[0], weight.shape[1] // 16)
        assert torch.equal(nvfp4_decode(codes, ones, one).reshape_as(groups) * scale, groups)


def test_experts_have_several_scales(made: GeneratedCheckpoint) -> None:
    weight = values(made, Role.ROUTED_EXPERT)[0]
    largest = weight.reshape(-1, 32).abs().amax(dim=-1)
    assert len(largest.log2().ceil().unique()) > 2


@pytest.mark.parametrize("role", [Role.ATTENTION, Role.SHARED_EXPERT])
def test_other_linears_are_e4m3_times_a_power_of_two_for_each_block(made: GeneratedCheckpoint, role: str) -> None:
    for weight in values(made, role):
        scale = fp8_block_scales(weight)
        assert torch.equal(fp8_block_decode(fp8_block_encode(weight, scale), scale), weight)


def test_what_lies_on_a_grid_is_what_the_release_stores_in_it(made: GeneratedCheckpoint) -> None:
    forms = {name: release_form(spec) for name, spec in made.specs.items()}
    kinds = {name: kind_of(spec, CONFIG["n_routed_experts"]).name.upper() for name, spec in made.specs.items()}
    assert {name: kind if kind in (MXFP4, FP8) else None for name, kind in kinds.items()} == forms


def test_hash_tables_have_distinct_experts_in_each_row(made: GeneratedCheckpoint) -> None:
    table = made.tensor("layers.0.ffn.gate.tid2eid")
    assert table.min() >= 0 and table.max() == CONFIG["n_routed_experts"] - 1
    assert all(len(set(row)) == len(row) for row in table.tolist())


def test_tensors_of_other_names_differ(made: GeneratedCheckpoint) -> None:
    names = [name for name, spec in made.specs.items() if spec.nbytes > 256]
    assert len({bytes(made.read(name)) for name in names}) == len(names)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(made: GeneratedCheckpoint, tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.3.w2.weight"
    assert bytes(generated(tmp_path).read(name)) == bytes(made.read(name))
    assert bytes(generated(tmp_path, seed=1).read(name)) != bytes(made.read(name))


def test_bytes_do_not_depend_on_the_order_of_reading(made: GeneratedCheckpoint, tmp_path: Path) -> None:
    again = generated(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(again.read, reversed(again.tensors)))
    assert [bytes(b) for b in reversed(backwards)] == [bytes(made.read(name)) for name in made.tensors]


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.attn.wq_b.weight", "layers.3.ffn.experts.0.w1.weight"])
def test_parts_of_a_tensor_are_its_bytes(made: GeneratedCheckpoint, name: str) -> None:
    whole = bytes(made.read(name))
    cuts = [0, 1, 1000, len(whole) // 2 + 3, len(whole)]
    parts = b""
    for start, end in pairwise(cuts):
        part = bytearray(end - start)
        made.read_part(name, start, memoryview(part))
        parts += part
    assert parts == whole


def test_values_made_on_the_device_are_those_that_are_read(made: GeneratedCheckpoint) -> None:
    for name, spec in made.specs.items():
        if spec.dtype == "BF16":
            there = torch.empty(spec.shape, dtype=torch.bfloat16)
            made.copy_to(name, there)
            assert torch.equal(there.view(torch.int16), made.tensor(name).view(torch.int16)), name


def test_a_buffer_of_another_size_is_refused(made: GeneratedCheckpoint) -> None:
    with pytest.raises(ValueError, match="the buffer 3"):
        made.read_into("embed.weight", memoryview(bytearray(3)))


def test_an_unknown_tensor_is_refused(made: GeneratedCheckpoint) -> None:
    with pytest.raises(SourceError, match="no such tensor"):
        made.read("layers.0.nothing")


def test_the_fingerprint_knows_seed_and_dimensions(made: GeneratedCheckpoint, tmp_path: Path) -> None:
    other = GeneratedCheckpoint.of({**CONFIG, "hidden_size": 512}, made.config_file)
    prints = [made.fingerprint(), generated(tmp_path, seed=1).fingerprint(), other.fingerprint()]
    assert len({json.dumps(p) for p in prints}) == 3
    assert made.fingerprint() == generated(tmp_path).fingerprint()


# ------------------------------------------------------------------------------------------------ in the native layout


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_a_packed_checkpoint_stands_for_the_plain_one(expert_dtype: str, tmp_path: Path) -> None:
    plain = GeneratedCheckpoint.of({**CONFIG, "expert_dtype": expert_dtype}, tmp_path)
    native = as_source(PackedCheckpoint.of(plain))
    assert (native.problems, native.tensors.keys()) == ((), plain.tensors.keys())
    assert [name for name in plain.tensors if bytes(native.read(name)) != bytes(plain.read(name))] == []


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_a_packed_checkpoint_has_the_tensors_of_the_release(expert_dtype: str, tmp_path: Path) -> None:
    plain = GeneratedCheckpoint.of({**CONFIG, "expert_dtype": expert_dtype}, tmp_path)
    packed = PackedCheckpoint.of(plain)
    stored = {
        s.name: (s.dtype, s.shape) for spec in plain.specs.values() for s in native_form(expert_dtype).stored(spec)
    }
    assert {name: (entry.dtype, entry.shape) for name, entry in packed.tensors.items()} == stored
    assert forms_of(as_source(packed))[MXFP4 if expert_dtype == "fp4" else FP8] >= 120


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.attn.wq_b.weight", "layers.0.attn.wq_b.scale",
                                  "layers.3.ffn.experts.0.w1.weight", "layers.3.ffn.experts.0.w1.scale"])  # fmt: skip
def test_parts_of_a_packed_tensor_are_its_bytes(name: str, made: GeneratedCheckpoint) -> None:
    packed = PackedCheckpoint.of(made)
    whole = bytes(packed.read(name))
    middle = bytearray(len(whole) - 2)
    packed.read_part(name, 1, memoryview(middle))
    assert bytes(middle) == whole[1:-1]


def test_packed_experts_with_half_a_group_in_a_row_are_refused(tmp_path: Path) -> None:
    plain = GeneratedCheckpoint.of({**CONFIG, "moe_intermediate_size": 144}, tmp_path)
    with pytest.raises(UsageError, match=r"layers\.0\.ffn\.experts\.0\.w2\.weight(.|\n)*multiple of 32"):
        PackedCheckpoint.of(plain)


def test_packed_and_plain_are_told_apart(made: GeneratedCheckpoint) -> None:
    assert PackedCheckpoint.of(made).fingerprint() != made.fingerprint()
