"""NVFP4 encoding and a whole toy run on the CPU, against stock llmcompressor on the same cores. Prints Markdown tables.

    python scripts/bench_cpu.py [--repeat 5] [--experts 4] [--only encode|run] [--threads N]

Encoding: weights under given scales to packed bytes and stored scales, compared byte for byte. Stock is
compressed-tensors' compressor, one call for each linear, as `compress_module` makes it; dsv4q is one call for all. Run:
`quantize` of a toy on the grids against `oneshot(pipeline="sequential")` and its save, imports not counted. The fastest
of the repeats counts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from bench_stock import calibrate, compress, save
from bench_tables import table
from dsv4q.config import load_config
from dsv4q.console import Console, Mode
from dsv4q.data.tokens import load_calibration, load_tokenizer
from dsv4q.formats.compare import error_sums
from dsv4q.formats.encode import nvfp4_decode, nvfp4_encode
from dsv4q.formats.exact import nvfp4_scales, round_e2m1
from dsv4q.formats.kernels import nvfp4_encode_measured
from dsv4q.made_up.native import grid_form
from dsv4q.made_up.toy import write_toy
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, upstream_names
from dsv4q.model.upstream import quiet_libraries
from dsv4q.quantize import Job, quantize
from dsv4q.run.calibration import data_wanted

CONFIG = Path(__file__).parent.parent / "src" / "dsv4q" / "configs" / "toy.yaml"
NVFP4 = QuantizationScheme(
    targets=["Linear"],
    format="nvfp4-pack-quantized",
    weights=QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, dynamic=False,
        scale_dtype=torch.float8_e4m3fn,
    ),
)  # fmt: skip


def fastest(calls: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Seconds of the fastest run of each after a first one; they take turns, so that other work hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat + 1):
        for call, found in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
    return [min(found[1:]) for found in times]


def linears(count: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random BF16 weights [count, rows, columns], their F32 block scales and global scales, as observers leave them."""
    weight = (torch.randn(count, rows, columns) / columns**0.5).to(torch.bfloat16)
    amax = weight.float().unflatten(-1, (-1, 16)).abs().amax(dim=-1)
    global_scale = 448 * 6 / amax.flatten(1).amax(dim=1, keepdim=True)
    return weight, (amax / 6 * global_scale[..., None]).to(torch.float8_e4m3fn).float(), global_scale


def stock_encode(weight: Tensor, scale: Tensor, global_scale: Tensor) -> list[dict[str, Tensor]]:
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    states = zip(weight, scale, global_scale, strict=True)
    names = ("weight", "weight_scale", "weight_global_scale")
    return [compressor.compress(dict(zip(names, state, strict=True)), NVFP4) for state in states]


def our_encode(weight: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    return nvfp4_encode(weight, scale, global_scale), scale.to(torch.float8_e4m3fn)


def encode_row(name: str, count: int, rows: int, columns: int, repeat: int) -> list[object]:
    """Million weights per second of both, on the same weights, after a comparison of the bytes."""
    made = linears(count, rows, columns)
    packed, scales = our_encode(*made)
    for i, state in enumerate(stock_encode(*made)):
        assert torch.equal(state["weight_packed"], packed[i]), f"linear {i} differs"
        assert torch.equal(state["weight_scale"].view(torch.uint8), scales[i].view(torch.uint8)), f"scale {i} differs"
    millions = made[0].numel() / 1e6
    stock, ours = fastest([lambda: stock_encode(*made), lambda: our_encode(*made)], repeat)
    return [f"{name}: {count} x [{rows}, {columns}]", millions / stock, millions / ours, stock / ours]


def parts_row(name: str, count: int, rows: int, columns: int, repeat: int) -> list[object]:
    """Million weights per second of each part of what a run calls encoding, on pairs of w1 and w3 on the MXFP4 grid."""
    weight = (torch.randn(count, 2, rows, columns) / columns**0.5).unflatten(-1, (-1, 32))
    grid = torch.exp2(torch.ceil(torch.log2(weight.abs().amax(dim=-1, keepdim=True) / 6)))
    weight = (round_e2m1(weight / grid) * grid).flatten(-2).to(torch.bfloat16)
    found, flat = nvfp4_scales(weight), weight.flatten(0, 1)
    scales = found.block_scale.flatten(0, 1), found.global_scale.expand(-1, 2).reshape(-1)
    packed = nvfp4_encode(flat, *scales, keep_negative_zero=True)
    stored = nvfp4_decode(packed, *scales)
    calls = (
        lambda: nvfp4_scales(weight),
        lambda: nvfp4_encode_measured(flat, *scales, keep_negative_zero=True),
        lambda: nvfp4_encode(flat, *scales, keep_negative_zero=True),
        lambda: nvfp4_decode(packed, *scales),
        lambda: error_sums(flat, stored),
    )
    seconds = fastest(calls, repeat)
    millions = weight.numel() / 1e6
    return [f"{name}: {2 * count} x [{rows}, {columns}]", *(millions / s for s in (sum(seconds[:2]), *seconds))]


def stock_run(job: Job, out: Path) -> dict[str, float]:
    """Seconds of loading, calibrating, compressing and saving."""
    wanted = data_wanted(job.config, job.source)
    assert wanted is not None
    begin = time.perf_counter()
    with quiet_libraries(), upstream_names():
        model = DeepseekV4ForCausalLMWithMTP.from_pretrained(
            job.source, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
        batches = list(load_calibration(wanted[0], load_tokenizer(job.source), wanted[1]).batches)
        calibrate(model, job, batches)
        seconds = {"compress": sum(compress(model, "cpu"))}
        save(model, out)
    return {**seconds, "all": time.perf_counter() - begin}


def our_run(job: Job) -> dict[str, float]:
    """Seconds of the whole command, its checks, journal and verification included, and of its encode stage.

    That stage also finds the experts' scales and measures every error, which stock does not.
    """
    begin = time.perf_counter()
    report = quantize(job, Console(Mode.QUIET))
    whole = time.perf_counter() - begin
    return {"compress": sum(block["seconds"].get("encode", 0.0) for block in report["blocks"]), "all": whole}


def run_rows(repeat: int) -> list[list[object]]:
    """Seconds of a whole run over a toy, and of the part of it that makes bytes of weights."""
    times: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        source, out, stock = (Path(folder, name) for name in ("source", "artifact", "stock"))
        write_toy(source, form=grid_form())
        job = Job(source, out, load_config(CONFIG), device="cpu")
        for _ in range(repeat + 1):
            times["stock"].append(stock_run(job, stock))
            times["ours"].append(our_run(job))
            shutil.rmtree(out)
            shutil.rmtree(stock)
    best = {
        who: {part: min(t[part] for t in found[1:]) for part in ("compress", "all")} for who, found in times.items()
    }
    names = {"compress": "toy run, compressing, s", "all": "toy run, all, s"}
    return [
        [name, best["stock"][part], best["ours"][part], best["stock"][part] / best["ours"][part]]
        for part, name in names.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--experts", type=int, default=4, help="full-width linears to encode")
    parser.add_argument("--threads", type=int, help="torch's threads; all cores if not given")
    parser.add_argument("--only", choices=("encode", "run"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {options.repeat}\n")
    if options.only != "run":
        rows = [encode_row("toy experts", 24, 128, 256, options.repeat)]
        if options.experts:
            rows.append(encode_row("full width", options.experts, 2048, 4096, options.repeat))
        print(table(["NVFP4 encoding, million weights/s", "stock", "dsv4q", "dsv4q / stock"], rows) + "\n", flush=True)
        rows = [parts_row("toy experts", 8, 128, 256, options.repeat)]
        if options.experts:
            rows.append(parts_row("full width", options.experts // 2, 2048, 4096, options.repeat))
        head = ("all", "exact scales", "encode and measure", "encode", "decode", "compare")
        print(table(["dsv4q's parts, million weights/s", *head], rows) + "\n", flush=True)
    if options.only != "encode":
        print(table(["", "stock", "dsv4q", "stock / dsv4q"], run_rows(options.repeat)))


if __name__ == "__main__":
    main()
