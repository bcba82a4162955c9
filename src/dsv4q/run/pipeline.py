"""One genuine llmcompressor `oneshot` over a model without memory, with our pipeline in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from dsv4q.errors import DeviceError
from dsv4q.model.upstream import quiet_libraries
from dsv4q.plan.plan import Plan

with quiet_libraries():
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session

    from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, build_meta_model, rebuild_rotary
    from dsv4q.run import observers  # noqa: F401 - registers them for recipes
    from dsv4q.run.block import PIPELINE, BlockStream


def run_oneshot(plan: Plan, folder: Path, make_stream: Callable[[DeepseekV4ForCausalLMWithMTP], BlockStream]) -> None:
    """Build the meta model, hand it to `oneshot` with the plan's recipe, and let `make_stream`'s stream run.

    Args:
        folder: work folder; the model's config.json goes there, for `oneshot` reads it again from disk and refuses
            a model whose config names another quantization, which a dequantized checkpoint's may well do.
    """
    settings = {key: value for key, value in plan.artifact_config.items() if key != "quantization_config"}
    # Several ranks must not write one file at once.
    home = folder / f"model.{os.getpid()}"
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    # tokenizers' threads and llmcompressor's dataset workers do not mix; it sets this itself, with a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with quiet_libraries():
        model = build_meta_model(settings, str(home))
        stream = make_stream(model)
        rebuild_rotary(model, stream.device)
        model.block_stream = stream
        try:
            oneshot(
                model=model,
                processor=object(),
                recipe=yaml.safe_dump(plan.config.library_recipe()),
                pipeline=PIPELINE,
                moe_calibrate_all_experts=plan.config.activations.experts == "all",
            )
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                "The GPU ran out of memory",
                where=f"--device {stream.device}",
                expected=f"about {plan.estimate.gpu:,} bytes free",
                found=str(error).splitlines()[0],
                hint="free the GPU of other work, or lower calibration.micro_batch and use --no-resume; finished "
                "blocks are kept",
            ) from error
        finally:
            reset_session()
    if stream.device.type == "cuda":
        torch.cuda.empty_cache()
