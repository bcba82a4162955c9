"""The CPU's kernels against their eager twins, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4q.__main__ import main
from dsv4q.config import load_config, parse_config
from dsv4q.formats import convert, kernels, native
from dsv4q.formats.convert import Nvfp4, mxfp4_to_nvfp4
from dsv4q.formats.encode import fp8_block_decode, fp8_block_encode
from dsv4q.formats.kernels import fp8_block_encode_measured
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.quantize import Job
from dsv4q.verify import packed as judge
from dsv4q.verify.judge import verify
from dsv4q.verify.packed import equal_fp8, equal_mxfp4
from runs import CONFIGS, at_toy_size, finished_files, run


@contextmanager
def eager() -> Iterator[None]:
    """As where Numba is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (convert, kernels, native, judge):
            patch.setattr(module, "cpu_kernels", lambda: None)
        yield


def both(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives, which its twin must give too."""
    assert kernels.cpu_kernels() is not None, "the tests need Numba"
    found = call()
    with eager():
        true = call()
    assert torch.equal(found, true)
    return found


def codes(rng: np.random.Generator, shape: tuple[int, ...], low: int = 0, high: int = 255) -> Tensor:
    return torch.from_numpy(rng.integers(low, high + 1, shape).astype(np.uint8))


def assert_equal(one: Nvfp4, other: Nvfp4) -> None:
    assert torch.equal(one.exact, other.exact)
    for mine, theirs in (
        (one.packed, other.packed), (one.block_scale.view(torch.uint8), other.block_scale.view(torch.uint8)),
        (one.global_scale, other.global_scale), (one.sums, other.sums),
    ):  # fmt: skip
        assert torch.equal(mine[one.exact], theirs[one.exact])


# ------------------------------------------------------------------------------------------------ whole commands


@pytest.fixture(scope="module")
def native_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy in DeepSeek's own layout."""
    source = tmp_path_factory.mktemp("kernels") / "source"
    write_toy(source, ToyConfig(), form=native_form())
    return source


@pytest.mark.parametrize("activations", ["bound", "observed"])
def test_a_run_gives_the_same_files_without_the_kernels(native_source: Path, tmp_path: Path, activations: str) -> None:
    config = at_toy_size(load_config(CONFIGS / "nvfp4-fp8-mtp.yaml"))
    if activations == "bound":
        raw = config.model_dump(mode="json", exclude_unset=True)
        config = parse_config({**raw, "activations": "bound", "calibration": None})
    run(Job(native_source, tmp_path / "with", config, device="cpu"))
    with eager():
        run(Job(native_source, tmp_path / "without", config, device="cpu"))
    files = finished_files(tmp_path / "with")
    assert files == finished_files(tmp_path / "without")
    different = [f for f in files if (tmp_path / "with" / f).read_bytes() != (tmp_path / "without" / f).read_bytes()]
    assert different == []
    with_kernels = verify(tmp_path / "with", source=native_source, deep=True, progress=None)
    with eager():
        without = verify(tmp_path / "with", source=native_source, deep=True, progress=None)
    assert with_kernels.ok and with_kernels.checks == without.checks and with_kernels.errors == without.errors


def dequantized(source: Path, out: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["dequantize", str(source), str(out), "--device", "cpu", "--quiet"])
    assert end.value.code == 0


def test_dequantize_gives_the_same_files_without_the_kernels(native_source: Path, tmp_path: Path) -> None:
    dequantized(native_source, tmp_path / "with")
    with eager():
        dequantized(native_source, tmp_path / "without")
    shards = sorted(path.name for path in (tmp_path / "with").glob("*.safetensors"))
    assert shards
    assert [s for s in shards if (tmp_path / "with" / s).read_bytes() != (tmp_path / "without" / s).read_bytes()] == []


def test_dsv4q_eager_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4Q_EAGER", "1")
    assert kernels.cpu_kernels.__wrapped__() is None


# ------------------------------------------------------------------------------------------------ conversion


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([(1, 1), (3, 1), (2, 2)]), st.integers(1, 5),
    st.sampled_from([16, 32, 48, 96]), st.integers(0, 250), st.integers(0, 22),
    st.sampled_from([0xFF, 0x77, 0x33, 0x11]),
)  # fmt: skip
def test_a_weight_is_converted_to_the_bytes_of_the_eager_twin(
    seed: int, stack: tuple[int, int], rows: int, columns: int, low: int, width: int, kept: int
) -> None:
    rng = np.random.default_rng(seed)
    packed = codes(rng, (*stack, rows, columns // 2)) & (kept | 0x88)
    scale = codes(rng, (*stack, rows, -(-columns // 32)), low, min(low + width, 255))
    found = mxfp4_to_nvfp4(packed, scale)
    with eager():
        assert_equal(found, mxfp4_to_nvfp4(packed, scale))


@pytest.mark.parametrize("apart", range(24))
def test_blocks_of_every_two_codes_are_moved_in_the_window_as_by_the_eager_twin(apart: int) -> None:
    """256 weights, each a loud block and one of a single byte throughout, `apart` binades below."""
    byte = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).repeat(1, 1, 1, 16)
    packed = torch.cat([torch.full_like(byte, 0x77), byte], dim=-1)
    scale = torch.tensor([127, 127 - apart], dtype=torch.uint8).repeat(256, 1, 1, 1)
    found = mxfp4_to_nvfp4(packed, scale)
    with eager():
        assert_equal(found, mxfp4_to_nvfp4(packed, scale))


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("columns", [2, 30, 32, 48, 64])
def test_every_mxfp4_byte_is_decoded_under_every_scale_as_by_the_eager_twin(columns: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, columns // 2, 1).permute(2, 0, 1).contiguous()
    scale = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(256, 1, -(-columns // 32))

    def bits() -> Tensor:
        out = torch.empty((256, 256, columns), dtype=torch.bfloat16)
        native.decode_into(packed, scale, out)
        return without_nan(out)

    both(bits)


@pytest.mark.parametrize("rows", [1, 128, 130])
def test_every_fp8_code_is_decoded_under_every_scale_as_by_the_eager_twin(rows: int) -> None:
    weight = torch.arange(256, dtype=torch.uint8).repeat(256, rows, 1).view(torch.float8_e4m3fn)
    scale = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1).repeat(1, -(-rows // 128), 2)

    def bits() -> Tensor:
        out = torch.empty((256, rows, 256), dtype=torch.bfloat16)
        native.decode_into(weight, scale, out)
        return without_nan(out)

    both(bits)


def without_nan(values: Tensor) -> Tensor:
    """Bits of BF16 values; of NaN, which has many, always the same."""
    return values.view(torch.int16).masked_fill(values.isnan(), 0x7FC0)


def test_threads_decode_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    packed, scale = codes(rng, (3, 300, 64)), codes(rng, (3, 300, 4), 60, 180)
    weight, under = codes(rng, (3, 300, 200), 0, 0x7E), codes(rng, (3, 3, 2), 60, 180)

    def bits() -> Tensor:
        out, other = torch.empty((3, 300, 128), dtype=torch.bfloat16), torch.empty((3, 300, 200), dtype=torch.bfloat16)
        native.decode_into(packed, scale, out)
        native.decode_into(weight.view(torch.float8_e4m3fn), under, other)
        return torch.cat([out.view(torch.int16).flatten(), other.view(torch.int16).flatten()])

    whole = both(bits)
    monkeypatch.setattr(kernels, "_ELEMENTS", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(bits(), whole)


# ------------------------------------------------------------------------------------------------ FP8


@pytest.mark.parametrize("exponent", [-126, -100, -9, 0, 7, 100, 127])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_of_bf16_is_encoded_as_by_the_eager_twin(exponent: int, dtype: torch.dtype) -> None:
    """Those on the grid, which the kernel takes, and all, of which it takes none."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    values = values.masked_fill(~values.isfinite(), 0.0)
    scale = torch.full((2, 2), 2.0**exponent, dtype=dtype)
    stored = fp8_block_decode(fp8_block_encode(values, scale), scale)
    on_grid = values.masked_fill(stored != values.to(torch.float32), -0.0)
    both(lambda: torch.cat([part.view(torch.uint8).flatten() for part in fp8_block_encode_measured(on_grid, scale)]))
    both(lambda: torch.cat([part.view(torch.uint8).flatten() for part in fp8_block_encode_measured(values, scale)]))


def test_a_weight_on_the_grid_is_encoded_by_the_kernel_also_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes_ = codes(rng, (700, 200), 0, 0x7E)
    scale = torch.exp2(torch.from_numpy(rng.integers(-20, 20, (6, 2)))).to(torch.bfloat16)
    weight = fp8_block_decode(codes_.view(torch.float8_e4m3fn), scale).to(torch.bfloat16)
    monkeypatch.setattr(kernels, "_ELEMENTS", 1000)
    monkeypatch.setattr(kernels, "fp8_block_encode", lambda *_: pytest.fail("rounded"))
    found, sums = fp8_block_encode_measured(weight, scale)
    assert torch.equal(found.view(torch.uint8), codes_) and sums[0] == 1


# ------------------------------------------------------------------------------------------------ the judge


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([16, 32, 48]), st.sampled_from([100, 119, 126, 127]), st.integers(0, 3),
    st.sampled_from([0xFF, 0x77, 0x33, 0x11, 0]),
)  # fmt: skip
def test_the_judge_finds_of_mxfp4_what_its_eager_twin_finds(
    seed: int, columns: int, exponent: int, wrong: int, kept: int
) -> None:
    rng = np.random.default_rng(seed)
    packed = codes(rng, (4, 1, 3, columns // 2)) & (kept | 0x88)
    scale = codes(rng, (4, 1, 3, -(-columns // 32)), 116, 127)
    made = mxfp4_to_nvfp4(packed, scale)
    stored, block, divisor = made.packed[:, 0], made.block_scale.view(torch.uint8)[:, 0], made.global_scale.clone()
    for _ in range(wrong):  # one bit of one of four weights
        part = (stored, block)[rng.integers(2)]
        part.view(-1)[rng.integers(part.numel())] ^= 1 << int(rng.integers(8))
    if exponent != 127:
        divisor[rng.integers(4)] = 2.0 ** (exponent - 127) * (3 if exponent == 119 else 1)
    arguments = packed[:, 0], scale[:, 0], stored, block.view(torch.float8_e4m3fn), divisor
    found = both(lambda: equal_mxfp4(*arguments))
    assert wrong or exponent != 127 or found.all()


def test_the_judge_takes_of_every_scale_what_its_eager_twin_takes() -> None:
    """One weight for each E8M0 and E4M3 code; +-0, and 1 under the same power of two."""
    mine, yours = (both.flatten() for both in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij"))
    for byte in (0x08, 0x22):
        words = torch.full((len(mine), 1, 8), byte, dtype=torch.uint8)
        scale, block = (part.to(torch.uint8).view(-1, 1, 1) for part in (mine, yours))
        divisor = torch.ones(len(mine), 1)
        found = both(lambda: equal_mxfp4(words, scale, words, block.view(torch.float8_e4m3fn), divisor))  # noqa: B023
        assert int(found.sum()) == (18 if byte == 0x22 else 18 * 244)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 200), st.integers(-19, 19), st.booleans())
def test_the_judge_finds_of_fp8_what_its_eager_twin_finds(
    seed: int, rows: int, columns: int, shift: int, wrong: bool
) -> None:
    rng = np.random.default_rng(seed)
    blocks = (2, -(-rows // 128), -(-columns // 128))
    stored = codes(rng, (2, rows, columns), 0, 8 + 8 * abs(shift) % 112)
    weight = stored.view(torch.float8_e4m3fn).float() * 2.0**shift
    weight = weight.clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.full(blocks, 127 - shift, dtype=torch.uint8)
    if wrong:
        stored.view(-1)[rng.integers(stored.numel())] ^= 1 << int(rng.integers(8))
    theirs = stored.view(torch.float8_e4m3fn)
    both(lambda: equal_fp8(weight, scale, theirs, torch.ones(blocks)))


@pytest.mark.parametrize("times", range(-19, 20))
def test_every_pair_of_fp8_codes_is_judged_as_by_the_eager_twin(times: int) -> None:
    """A weight of one element for each pair."""
    mine, yours = (both.flatten() for both in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij"))
    pairs = [part.to(torch.uint8).view(-1, 1, 1).view(torch.float8_e4m3fn) for part in (mine, yours)]
    near = [part[::7] for part in pairs] if times else pairs
    scale = torch.full(near[0].shape, 127 + times, dtype=torch.uint8)
    both(lambda: equal_fp8(near[0], scale, near[1], torch.ones(scale.shape)))
