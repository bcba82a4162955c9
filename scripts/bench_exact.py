"""Weight error and time of each way to find scales, on the grid and off it. Prints a Markdown table.

    python scripts/bench_exact.py [--device cuda] [--rows 2048] [--columns 4096] [--repeat 3]

"On the grid" is a Gaussian weight that was rounded to MXFP4 (one E8M0 scale per 32) or to FP8 with power-of-two scales
per 128x128 and dequantized to BF16, as the BF16 form of the official release is. "Gaussian" was never rounded. Relative
error is Frobenius; "served" is after the consumer rounds FP8 block scales up to UE8M0, which it does while loading.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.observers import Observer
from torch import Tensor

from dsv4q.formats.encode import fp8_block_decode, fp8_block_encode, nvfp4_decode, nvfp4_encode
from dsv4q.formats.exact import fp8_block_scales, round_e2m1
from dsv4q.run.observers import ExactFp8BlockObserver, ExactNvfp4Observer  # noqa: F401 - registers them

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}


def to_mxfp4_and_back(weight: Tensor) -> Tensor:
    """BF16 of the nearest MXFP4 under scales 2^ceil(log2(amax / 6))."""
    blocks = weight.float().reshape(weight.shape[0], -1, 32)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(dim=-1, keepdim=True) / 6)))
    return (round_e2m1(blocks / scale) * scale).reshape(weight.shape).to(torch.bfloat16)


def to_fp8_and_back(weight: Tensor) -> Tensor:
    """BF16 of the nearest FP8 under power-of-two scales per 128x128."""
    scale = fp8_block_scales(weight)
    return fp8_block_decode(fp8_block_encode(weight, scale), scale).to(torch.bfloat16)


def scales(observer: str, arguments: dict[str, object], weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """What an observer gives for one weight."""
    args = QuantizationArgs(**arguments, observer=observer)
    found = Observer.load_from_registry(observer, base_name="weight", args=args)
    found(weight)
    params = found.get_qparams()
    return params["scale"], params["global_scale"]


def nvfp4_error(weight: Tensor, scale: Tensor, global_scale: Tensor) -> float:
    back = nvfp4_decode(nvfp4_encode(weight, scale, global_scale), scale, global_scale)
    return relative(back, weight)


def fp8_errors(weight: Tensor, scale: Tensor) -> tuple[float, float]:
    """Error of the file, and after the consumer's own rounding of the scales."""
    once = fp8_block_decode(fp8_block_encode(weight, scale), scale)
    power = torch.exp2(torch.ceil(torch.log2(scale.float())))
    twice = fp8_block_decode(fp8_block_encode(once, power), power)
    return relative(once, weight), relative(twice, weight)


def relative(back: Tensor, weight: Tensor) -> float:
    reference = weight.double()
    return float((back.double() - reference).norm() / reference.norm())


def best_time(call: Callable[[], object], repeat: int, device: str) -> float:
    """Seconds of the fastest of `repeat` calls after a first one."""
    times = []
    for _ in range(repeat + 1):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    gauss = (torch.randn(options.rows, options.columns) * 0.02).to(torch.bfloat16).to(options.device)
    print(f"[{options.rows}, {options.columns}], {options.device}, torch {torch.__version__}\n")
    print("| NVFP4 scales by | on the grid | Gaussian | ms on the grid | ms Gaussian |\n|---|---|---|---|---|")
    for name in ("memoryless_minmax", "memoryless_mse", "nvfp4_expanded_mse", "exact_nvfp4"):
        cells = []
        for weight in (to_mxfp4_and_back(gauss), gauss):
            seconds = best_time(lambda w=weight, n=name: scales(n, NVFP4, w), options.repeat, options.device)
            cells.append((nvfp4_error(weight, *scales(name, NVFP4, weight)), seconds * 1000))
        print(
            f"| `{name}` | {cells[0][0]:.2%} | {cells[1][0]:.2%} | {cells[0][1]:.1f} | {cells[1][1]:.1f} |", flush=True
        )
    print("\n| FP8 scales by | on the grid, served | Gaussian | Gaussian, served |\n|---|---|---|---|")
    for name in ("memoryless_minmax", "exact_fp8_block"):
        grid = fp8_errors(to_fp8_and_back(gauss), scales(name, FP8, to_fp8_and_back(gauss))[0])
        off = fp8_errors(gauss, scales(name, FP8, gauss)[0])
        print(f"| `{name}` | {grid[1]:.2%} | {off[0]:.2%} | {off[1]:.2%} |", flush=True)


if __name__ == "__main__":
    main()
