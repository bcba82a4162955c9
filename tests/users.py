"""Sources and commands as users have them: a small checkpoint to put into other places, the real command around it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dsv4q.__main__ import main
from dsv4q.layout import CSA, SLIDING
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.run.pipeline import BlockLoop
from runs import CONFIGS

SMALL = ToyConfig(compress_ratios=(SLIDING, CSA), num_hash_layers=1, n_routed_experts=4, shards=2)
"""Two layers, one of them hash-routed, and the draft."""
FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Said:
    """What a command left."""

    code: int
    out: str
    err: str


def dsv4q(*arguments: object) -> Said:
    """The real command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    code = stopped.value.code
    said = Said(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
    assert "Traceback" not in said.err
    return said


def small_source(folder: Path, *, native: bool = False) -> Path:
    """A checkpoint that a run takes a second or two for."""
    write_toy(folder, SMALL, 0, native_form()) if native else write_toy(folder, SMALL)
    return folder


def config(folder: Path, **sections: Any) -> Path:
    """The toy's config in two shards, without calibration unless a section says otherwise."""
    raw = yaml.safe_load((CONFIGS / "toy.yaml").read_text()) | {"output": {"shards": 2}, "activations": "bound"}
    del raw["calibration"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (raw | sections).items() if v is not None}))
    return path


def calibrated(folder: Path, **calibration: Any) -> Path:
    """The same with calibration on the toy's own samples."""
    section = yaml.safe_load((CONFIGS / "toy.yaml").read_text())["calibration"] | {"samples": 4, "max_length": 32}
    return config(folder, activations=None, calibration=section | calibration)


def in_hub_cache(source: Path, cache: Path) -> Path:
    """The files of a source as `hf download` keeps them; the snapshot, whose files are links."""
    repository = cache / "models--deepseek-ai--DeepSeek-V4-Small"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(link.relative_to(repository).parts) - 1
        link.symlink_to(Path(*[".."] * depth, "blobs", blob.name))
    return snapshot


def shard_of(source: Path, tensor: str) -> Path:
    return source / str(json.loads((source / INDEX).read_text())["weight_map"][tensor])


def edit(source: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change one tensor of a source in place."""
    shard = shard_of(source, name)
    tensors = load_file(shard)
    change(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})


def edit_config(source: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextlib.contextmanager
def stopping_at(block: str) -> Iterator[None]:
    """Context in which a run stops, as by Ctrl-C, when it comes to a block."""
    real = BlockLoop._next

    def next_but(self: BlockLoop, blocks: Any, task: Any, watch: Any) -> Any:
        if task.name == block:
            raise KeyboardInterrupt
        return real(self, blocks, task, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockLoop, "_next", next_but)
        yield
