"""Stock llmcompressor on a benchmark's source: `oneshot(pipeline="sequential")` and its own save; prints JSON.

    python scripts/bench_stock.py SOURCE OUT [--config C] [--samples 64] [--length 512] [--micro-batch 8]

The recipe is the config's with llmcompressor's own observers on the weights; the samples are those that `dsv4q
quantize` takes. The model lies in host memory and is brought to the GPU layer by layer, as stock does it. Forward
hooks note when the batches pass a layer; nothing of stock is changed. Its compression is called before the save, layer
by layer, so that both can be timed; the save finds everything compressed and only writes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors import ModelCompressor
from llmcompressor import oneshot
from torch.utils.data import DataLoader, Dataset

from bench_dsv4q import add_options, config_of, finish, sync
from dsv4q.config import Config
from dsv4q.data.tokens import load_calibration, load_tokenizer
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, upstream_names
from dsv4q.model.upstream import quiet_libraries
from dsv4q.quantize import Job
from dsv4q.run.calibration import data_wanted


class Marks(Dataset[dict[str, torch.Tensor]]):
    """The batches, and when they entered each layer."""

    def __init__(self, model: DeepseekV4ForCausalLMWithMTP, batches: list[torch.Tensor]) -> None:
        self.batches = batches
        self.entered: dict[torch.nn.Module, list[float]] = defaultdict(list)
        self.layers = list(model.model.layers)
        self.after = model.model.norm
        for module in (*self.layers, self.after):
            module.register_forward_pre_hook(lambda m, _args: self.entered[m].append(time.perf_counter()))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError(index)
        # Stock traces the model with the first batch, then reads all: only what comes after that is its work.
        self.entered.clear()
        return {"input_ids": self.batches[index]}

    def seconds(self) -> list[dict[str, float]]:
        """Of each layer: `calibrate`, the first pass with the scales found at its end; `propagate`, the second."""
        begins = [self.entered[layer][0] for layer in self.layers] + [self.entered[self.after][-1]]
        found = []
        for layer, begin, end in zip(self.layers, begins[:-1], begins[1:], strict=True):
            times = self.entered[layer]
            assert len(times) == 2 * len(self), f"a layer was entered {len(times)} times"
            second = times[len(self)]
            found.append({"calibrate": second - begin, "propagate": end - second})
        return found


def stock_recipe(config: Config) -> str:
    """The recipe as YAML, without an observer of ours."""
    recipe: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config.recipe))
    for stage in recipe.values():
        for modifiers in stage.values():
            for group in modifiers["QuantizationModifier"]["config_groups"].values():
                group["weights"].pop("observer", None)
    return yaml.safe_dump(recipe)


def calibrate(model: DeepseekV4ForCausalLMWithMTP, job: Job, batches: list[torch.Tensor]) -> list[dict[str, float]]:
    """Run `oneshot`; seconds of each layer."""
    marks = Marks(model, batches)
    oneshot(
        model=model,
        processor=object(),
        dataset=DataLoader(marks, batch_size=None),
        recipe=stock_recipe(job.config),
        pipeline="sequential",
        sequential_targets=["DeepseekV4DecoderLayer"],
        moe_calibrate_all_experts=job.config.activations.experts == "all",
    )
    return marks.seconds()


def compress(model: DeepseekV4ForCausalLMWithMTP, device: str) -> list[float]:
    """Compress in memory as `save_pretrained` would; seconds of each layer."""
    compressor = ModelCompressor.from_pretrained_model(model)
    found = []
    for layer in model.model.layers:
        begin = time.perf_counter()
        compressor.compress_model(layer, skip_compressed=True)
        sync(device)
        found.append(time.perf_counter() - begin)
    return found


def save(model: DeepseekV4ForCausalLMWithMTP, out: Path) -> dict[str, float]:
    """Seconds of stock's own save, and of making its files durable, which it leaves to the system."""
    begin = time.perf_counter()
    model.save_pretrained(out, save_compressed=True)
    saved = time.perf_counter()
    for path in out.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {"save": saved - begin, "fsync": time.perf_counter() - saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    job = Job(options.source, options.out, config_of(options), device=options.device)
    wanted = data_wanted(job.config, job.source)
    assert wanted is not None, "the config calibrates nothing"
    begin = time.perf_counter()
    with quiet_libraries():
        with upstream_names():
            model = DeepseekV4ForCausalLMWithMTP.from_pretrained(
                job.source, dtype=torch.bfloat16, attn_implementation="eager"
            ).eval()
        load = time.perf_counter() - begin
        batches = list(load_calibration(wanted[0], load_tokenizer(job.source), wanted[1]).batches)
        layers = calibrate(model, job, batches)
        for layer, seconds in zip(layers, compress(model, job.device), strict=True):
            layer["compress"] = seconds
        saved = save(model, job.out)
    finish({"load": load, "layers": layers, **saved})


if __name__ == "__main__":
    main()
