"""The GPU kernels against their eager twins, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4q.formats import kernels
from dsv4q.formats.compare import error_sums
from dsv4q.formats.convert import bf16_to_nvfp4
from dsv4q.formats.encode import nvfp4_decode, nvfp4_encode
from dsv4q.formats.exact import nvfp4_grid, nvfp4_scales, round_e2m1
from dsv4q.formats.native import decode_into, fp8_to_bf16, mxfp4_to_bf16

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def weights(kind: str, device: str) -> Tensor:
    """BF16 [3, 2, 256, 512]: on the MXFP4 grid, Gaussian, heavy-tailed."""
    found = torch.randn(3, 2, 256, 512, generator=torch.Generator(device).manual_seed(7), device=device)
    if kind == "grid":
        blocks = found.reshape(-1, 32)
        scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(1, keepdim=True) / 6)))
        found = (round_e2m1(blocks / scale) * scale).reshape(found.shape)
    elif kind == "heavy":
        found = found.pow(3)
    return found.to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["grid", "gauss", "heavy"])
@pytest.mark.parametrize("keep", [True, False])
def test_tiles_encode_and_measure_as_one_call_does(kind: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(kind, "cpu").flatten(0, 1)
    scales = nvfp4_scales(weight[:, None])
    block, divisor = scales.block_scale[:, 0], scales.global_scale[:, 0]
    whole = nvfp4_encode(weight, block, divisor, keep_negative_zero=keep)
    sums = error_sums(weight, nvfp4_decode(whole, block, divisor))
    for tile in (512 * 3, 256 * 512 * 2, 1 << 30):
        monkeypatch.setattr(kernels, "TILE", tile)
        packed, found = kernels.nvfp4_encode_measured(weight, block, divisor, keep_negative_zero=keep)
        assert torch.equal(packed, whole)
        torch.testing.assert_close(found, sums, rtol=1e-6, atol=0)


def test_a_weight_that_is_exact_in_every_tile_is_exact_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("grid", "cpu").flatten(0, 1)[:1, :30]
    scales = nvfp4_scales(weight[:, None])
    monkeypatch.setattr(kernels, "TILE", 3 * weight.shape[2])  # ten tiles: ten tenths make less than one in F64
    _, sums = kernels.nvfp4_encode_measured(
        weight, scales.block_scale[:, 0], scales.global_scale[:, 0], keep_negative_zero=True
    )
    assert sums[0, 0].item() == 1.0


@gpu
@pytest.mark.parametrize("kind", ["grid", "gauss", "heavy"])
def test_the_gpu_finds_the_grid_that_eager_code_finds(kind: str) -> None:
    weight = weights(kind, "cuda")
    there, here = nvfp4_grid(weight), nvfp4_grid(weight.cpu())
    assert kernels.nvfp4_grid_bits(weight) is not None, "no kernel was used"
    assert torch.equal(there.lower.cpu(), here.lower) and torch.equal(there.upper.cpu(), here.upper)
    assert torch.equal(there.amax.cpu(), here.amax)


@gpu
@pytest.mark.parametrize("kind", ["grid", "gauss", "heavy"])
@pytest.mark.parametrize("keep", [True, False])
def test_the_gpu_encodes_and_measures_as_eager_code_does(kind: str, keep: bool) -> None:
    weight = weights(kind, "cuda").flatten(0, 1)
    scales = nvfp4_scales(weight[:, None])
    block, divisor = scales.block_scale[:, 0].contiguous(), scales.global_scale[:, 0].contiguous()
    packed, sums = kernels.nvfp4_encode_measured(weight, block, divisor, keep_negative_zero=keep)
    eager = nvfp4_encode(weight, block, divisor, keep_negative_zero=keep)
    assert torch.equal(packed, eager)
    torch.testing.assert_close(sums, error_sums(weight, nvfp4_decode(eager, block, divisor)), rtol=1e-12, atol=0)


@gpu
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("spread", [0, 2, 12])
def test_the_gpu_stores_exact_weights_at_once_as_scales_and_codes_one_by_one_do(shared: int, spread: int) -> None:
    weight = weights("grid", "cuda").to(torch.float32).unflatten(-1, (-1, 32))
    moved = torch.exp2(torch.randint(-spread, spread + 1, (*weight.shape[:-1], 1), device="cuda").to(torch.float32))
    weight = (weight * moved).flatten(-2).to(torch.bfloat16).reshape(-1, shared, 256, 512)
    weight[0, :, :3] = -0.0
    straight, scales = bf16_to_nvfp4(weight), nvfp4_scales(weight)
    assert straight is not None
    exact = (scales.exact_blocks == weight[0, 0].numel() // 16).all(dim=1)
    assert torch.equal(straight.exact, exact) and bool(exact.all() if spread < 12 else not exact.all())
    each = scales.global_scale.expand(-1, shared).reshape(-1)
    codes = nvfp4_encode(weight.flatten(0, 1), scales.block_scale.flatten(0, 1), each, keep_negative_zero=True)
    sums = error_sums(weight.flatten(0, 1), nvfp4_decode(codes, scales.block_scale.flatten(0, 1), each))
    assert torch.equal(straight.global_scale[exact], scales.global_scale[exact])
    assert torch.equal(straight.block_scale[exact].to(torch.float32), scales.block_scale[exact])
    assert torch.equal(straight.packed[exact], codes.view(straight.packed.shape)[exact])
    torch.testing.assert_close(straight.sums[exact], sums.view(straight.sums.shape)[exact], rtol=1e-12, atol=0)


@gpu
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e-39, 1.1])
def test_the_gpu_leaves_a_weight_with_one_value_off_the_grid_to_the_ordinary_way(odd: float) -> None:
    weight = weights("grid", "cuda")
    weight[1, 1, 200, 300] = odd
    straight = bf16_to_nvfp4(weight)
    assert straight is not None and straight.exact.tolist() == [True, False, True]


@gpu
@pytest.mark.parametrize("spread", [1.0, 4.0, 30.0])
def test_the_gpu_computes_the_gate_as_eager_code_does(spread: float) -> None:
    gate, up = (torch.randn(700, 2048, device="cuda").mul(spread).to(torch.bfloat16) for _ in range(2))
    expected = torch.nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(min=-10.0, max=10.0)
    ends = torch.full((2, kernels.swiglu_parts(gate.numel()) + 16), float("nan"), device="cuda")
    assert torch.equal(kernels.swiglu(gate.clone(), up.clone(), 10.0, ends), expected)
    parts = expected.flatten().split(kernels.SWIGLU_BLOCK)
    for at, end in enumerate((torch.amin, torch.amax)):
        assert torch.equal(ends[at, : len(parts)], torch.stack([end(part) for part in parts]).to(torch.float32))
    assert bool(ends[:, len(parts) :].isnan().all()), "places that are not needed were written"
    assert torch.equal(kernels.swiglu(gate.clone(), up.clone(), 10.0), expected)


def _every_code_and_scale(form: str) -> tuple[Tensor, Tensor]:
    """All 256 bytes under every E8M0 scale whose values BF16 holds, [scales, 32 columns and more]."""
    if form == "mxfp4":
        scales = torch.arange(0, 253, dtype=torch.uint8)
        codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
        return codes.repeat(len(scales), 1), scales.repeat_interleave(16)[:, None]
    scales = torch.arange(3, 247, dtype=torch.uint8)
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    tile = codes.repeat(65)[: 128 * 128].reshape(128, 128)
    return tile.repeat(len(scales), 1).view(torch.float8_e4m3fn), scales[:, None]


@gpu
@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_the_gpu_decodes_every_native_code_and_scale_as_the_cpu_does(form: str) -> None:
    decode = mxfp4_to_bf16 if form == "mxfp4" else fp8_to_bf16
    codes, scales = _every_code_and_scale(form)
    there, here = decode(codes.cuda(), scales.cuda()), decode(codes, scales)
    assert torch.equal(there.cpu().view(torch.int16), here.view(torch.int16))


@gpu
def test_the_gpu_decodes_mxfp4_into_place_as_the_cpu_does() -> None:
    codes, scales = _every_code_and_scale("mxfp4")
    codes, scales = codes.reshape(1, -1, 32).repeat(2, 1, 2), scales.reshape(1, -1, 2).repeat(2, 1, 2)
    here, there = (torch.empty((*codes.shape[:-1], 128), dtype=torch.bfloat16, device=d) for d in ("cpu", "cuda"))
    decode_into(codes, scales, here)
    decode_into(codes.cuda(), scales.cuda(), there)
    assert torch.equal(there.cpu().view(torch.int16), here.view(torch.int16))


@gpu
def test_a_run_compiles_nothing_more_once_the_kernels_are_warm() -> None:
    kernels.warm_up(torch.device("cuda"))
    ours = kernels._triton()
    assert ours is not None
    every = [ours._decode, ours._grid, ours._top, ours._exact, ours._encode, ours._swiglu]
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in every]
    weight = torch.randn((2, 2048, 4096), device="cuda").to(torch.bfloat16)
    for together in (weight[:, None], weight[None]):
        assert bf16_to_nvfp4(together) is not None
    exact = nvfp4_scales(weight[:, None])
    kernels.nvfp4_encode_measured(
        weight, exact.block_scale[:, 0], exact.global_scale.flatten(), keep_negative_zero=True
    )
    decode_into(torch.zeros((2, 2048, 2048), dtype=torch.uint8, device="cuda"),
                torch.zeros((2, 2048, 128), dtype=torch.uint8, device="cuda"), weight)  # fmt: skip
    some = torch.zeros((3, 2, kernels.swiglu_parts(2 * weight[0].numel())), device="cuda")
    for ends in some:
        kernels.swiglu(weight[0], weight[1], 10.0, ends)
    assert [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in every] == before
