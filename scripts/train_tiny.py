"""Train a tiny DeepSeek-V4 with MTP and write it as the official release stores its model. Needs no network.

    python scripts/train_tiny.py --out models/tiny [--device cuda] [--steps 3000] [--minutes 4] [--width tiny]
        [--seed 0] [--batch 32] [--length 512] [--learning-rate 2e-3] [--conversations 120000] [--data-only]

Makes the corpus (corpus.py), a tokenizer, the model (train_tiny_model.py); trains it, in the last part with rounded
weights (train_tiny_rounding.py); writes, reads again and judges it (train_tiny_finish.py). The schedule goes by steps
or by minutes, whichever is further, so it ends properly when the time is over; Ctrl-C ends it with what is there.
OUT must be new or empty. All that the end needs is looked for before the training; the files are made in a folder
beside OUT, which takes its place when it is whole, so OUT is complete once it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import corpus
from dsv4q.data.tokens import encode_chat
from dsv4q.errors import Dsv4qError
from dsv4q.host import usable_device
from dsv4q.layout import CSA, HCA, SLIDING, source_tensors
from dsv4q.made_up.toy import FOR_VLLM, ToyConfig
from dsv4q.made_up.words import train_tokenizer
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP
from train_tiny_finish import (
    Training,
    built_beside,
    check_held_out,
    figures_json,
    judge,
    model_card,
    read_license,
    text_files,
    write_native,
    write_texts,
)
from train_tiny_model import DRAFT_WEIGHT, Losses, Watch, build, csa_layers, inputs_for, run, set_rounding

_SERVED = ToyConfig(**FOR_VLLM, vocab_size=1024, shards=2)
WIDTHS = {
    "tiny": replace(
        _SERVED,
        hidden_size=256,
        n_routed_experts=8,
        compress_ratios=(SLIDING, SLIDING, CSA, HCA, SLIDING),
        num_hash_layers=2,
        num_attention_heads=4,
        q_lora_rank=128,
    ),
    "served": replace(
        _SERVED,
        hidden_size=512,
        n_routed_experts=16,
        compress_ratios=(SLIDING, SLIDING, CSA, HCA, CSA, HCA),
        num_hash_layers=3,
        num_attention_heads=8,
        q_lora_rank=256,
        o_lora_rank=256,
        shards=5,
    ),
    "small": ToyConfig(hidden_size=128, o_lora_rank=64, num_attention_heads=4, index_topk=32, shards=2),
    "least": ToyConfig(
        hidden_size=128,
        n_routed_experts=4,
        compress_ratios=(SLIDING, CSA, HCA),
        num_hash_layers=1,
        num_attention_heads=2,
        o_groups=1,
        o_lora_rank=128,
        shards=2,
    ),
}
WARM_UP, ROUNDED_FROM, BALANCED_UNTIL, SPARSE_FROM = 0.03, 0.6, 0.9, 0.3
"""Parts of the schedule. Before SPARSE_FROM attention sees every compressed entry, so that the indexer learns to tell
them apart before its choice counts."""
LEAST_RATE = 0.02
"""Of the learning rate, at the end."""
BALANCE_RATE = 2e-3
DECAY = 0.1
LOOKS = 12
"""Evaluations on held-out text during the run."""
TOKENIZER_CONVERSATIONS = 8000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", choices=tuple(WIDTHS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--conversations", type=int, default=120_000, help="size of the corpus")
    parser.add_argument(
        "--samples", type=int, default=64, help="held-out samples that the finished files are judged on"
    )
    parser.add_argument("--machine", default="", help="what the model card calls the machine")
    parser.add_argument("--data-only", action="store_true", help="write tokenizer and texts, train nothing")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is there and not empty")
    for name in ("steps", "minutes", "batch", "length", "conversations", "samples"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be more than 0")
    return options


# ------------------------------------------------------------------------------------------ data


@dataclass
class Text:
    """Tokens of many conversations, one after the other."""

    ids: Tensor
    """I64 [all tokens]."""
    starts: Tensor
    """I64: where a conversation begins that has a whole sample after it."""

    def batch(self, count: int, length: int, random: torch.Generator | None) -> Tensor:
        """Samples [count, length], each from the begin of a conversation on: at random, or evenly over the text."""
        if random is None:
            chosen = self.starts[torch.linspace(0, len(self.starts) - 1, count).long()]
        else:
            places = torch.randint(len(self.starts), (count,), generator=random, device=self.starts.device)
            chosen = self.starts[places]
        return self.ids[chosen[:, None] + torch.arange(length, device=chosen.device)]


def text_of(tokenizer: str, conversations: Sequence[corpus.Conversation], length: int, device: torch.device) -> Text:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer)
    found: list[list[int]] = []
    for first in range(0, len(conversations), 4096):
        texts = [encode_chat(messages, "chat") for messages in conversations[first : first + 4096]]
        found += [one.ids for one in encoder.encode_batch(texts, add_special_tokens=False)]
    lengths = torch.tensor([len(ids) for ids in found])
    ids = torch.tensor([token for one in found for token in one])
    starts = lengths.cumsum(0) - lengths
    starts = starts[starts + length <= len(ids)]
    if not len(starts):
        raise SystemExit(f"{len(ids)} tokens of text are too few for a sample of {length}; raise --conversations")
    return Text(ids.to(device), starts.to(device))


# ------------------------------------------------------------------------------------------ training


@dataclass
class Schedule:
    """Where a run stands, from 0 to 1: by steps or by time, whichever is further."""

    steps: int
    seconds: float
    begin: float
    stopped: bool = False

    def progress(self, step: int) -> float:
        return min(1.0, max(step / self.steps, (time.perf_counter() - self.begin) / self.seconds))

    def stop_on_signals(self) -> None:
        """The first Ctrl-C or SIGTERM ends the training, the second the process."""

        def stop(number: int, _: object) -> None:
            self.stopped = True
            signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


def rate_at(progress: float, highest: float) -> float:
    """Learning rate: linear warm-up, then cosine."""
    if progress < WARM_UP:
        return highest * (0.02 + 0.98 * progress / WARM_UP)
    wave = (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return highest * (LEAST_RATE + (1 - LEAST_RATE) * wave)


def optimizer_of(model: nn.Module, rate: float, device: torch.device) -> torch.optim.AdamW:
    """Weight decay for linears and experts; none for norms, embedding, hyper-connections and other small things."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "_hc." in name or "embed" in name or "position_bias" in name]
    kept = {id(p) for p in plain}
    groups = [
        {"params": [p for _, p in named if id(p) not in kept], "weight_decay": DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")


@dataclass
class Trained:
    steps: int
    rounded_steps: int
    seconds: float


class Trainer:
    """One run: model, data, schedule, and the best state so far."""

    def __init__(
        self, options: argparse.Namespace, model: DeepseekV4ForCausalLMWithMTP, texts: tuple[Text, Text]
    ) -> None:
        self.options, self.model = options, model
        self.training, held_out = texts
        self.held_out = held_out.batch(options.batch, options.length + 2, None)
        self.watch = Watch(model)
        self.inputs = inputs_for(model, options.batch, options.length)
        self.device = self.held_out.device
        self.random = torch.Generator(self.device).manual_seed(options.seed)
        self.optimizer = optimizer_of(model, options.learning_rate, self.device)
        self.topk = model.config.index_topk
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        self.rounded_steps = 0
        self.is_rounded = False

    def train(self, schedule: Schedule) -> Trained:
        """Run to the end of the schedule; the model is then the best rounded one.

        Raises:
            SystemExit: the loss is not a finite number.
        """
        step, looked, progress = 0, 0.0, 0.0
        while progress < 1 and not schedule.stopped:
            self._set_stage(progress)
            losses = self._step(rate_at(progress, self.options.learning_rate), progress)
            step += 1
            if step % 50 == 0 or step <= 3:
                self._say(step, schedule, losses)
            progress = schedule.progress(step)
            if progress >= looked + 1 / LOOKS or progress >= 1:
                looked = progress
                self._look(step)
        if not self.best:
            self._set_stage(1.0)
            self._look(step)
        self.model.load_state_dict(self.best)
        return Trained(step, self.rounded_steps, time.perf_counter() - schedule.begin)

    def _set_stage(self, progress: float) -> None:
        if progress >= ROUNDED_FROM and not self.is_rounded:
            set_rounding(self.model, True)
            self.is_rounded = True
        for layer in csa_layers(self.model):
            layer.self_attn.compressor.indexer.index_topk = (
                self.topk if progress >= SPARSE_FROM else self.options.length
            )

    def _step(self, rate: float, progress: float) -> Losses:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = self.training.batch(self.options.batch, self.options.length + 2, self.random)
        losses = run(self.model, self.watch, ids, self.inputs)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.rounded_steps += self.is_rounded
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if progress < BALANCED_UNTIL:
            self.watch.balance(BALANCE_RATE * (1 - progress / BALANCED_UNTIL))
        return losses

    def _say(self, step: int, schedule: Schedule, losses: Losses) -> None:
        main, draft, indexer, agreement = torch.stack(
            [losses.main, losses.draft, losses.indexer, losses.agreement]
        ).tolist()
        if not math.isfinite(main + draft):
            raise SystemExit(f"the loss is not a number at step {step}; try a lower --learning-rate")
        used = [float(c.min() / c.mean()) for c in self.watch.chosen.values()]
        seconds = time.perf_counter() - schedule.begin
        parts = (
            f"step {step:5d} {seconds:6.1f} s {seconds / step * 1e3:6.1f} ms/step",
            f"progress {schedule.progress(step):.2f}",
            f"main {main:.4f} draft {draft:.4f} indexer {indexer:.3f}",
            f"agreement {agreement:.3f}",
            f"least used expert {min(used, default=1.0):.2f}",
        )
        print("  ".join(parts), flush=True)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Judge on held-out text; keep the state if it is the best of the rounded ones."""
        self.model.eval()
        losses = run(self.model, self.watch, self.held_out, self.inputs)
        self.model.train()
        main, draft, agreement = float(losses.main), float(losses.draft), float(losses.agreement)
        rounded = " with rounded weights" if self.is_rounded else ""
        print(
            f"held-out text at step {step}{rounded}: perplexity {math.exp(main):.3f}, of the draft"
            f" {math.exp(draft):.3f}, agreement {agreement:.3f}",
            flush=True,
        )
        loss = main + DRAFT_WEIGHT * draft
        if self.is_rounded and loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


# ------------------------------------------------------------------------------------------ the whole


def main() -> None:
    options = parse()
    try:
        device, license_text = usable_device(options.device), read_license()
        with built_beside(options.out) as folder:
            figures = make(options, device, license_text, folder)
    except Dsv4qError as error:
        sys.exit(f"error: {error.text()}")
    if figures:
        print(figures)
        print(f"{options.out}: {sum(f.stat().st_size for f in options.out.rglob('*') if f.is_file()) / 1e6:.2f} MB")


def make(options: argparse.Namespace, device: torch.device, license_text: str, folder: Path) -> str:
    """The checkpoint, or its texts alone, in an empty folder; its figures as JSON, nothing if there is no model.

    Raises:
        DataError: the corpus is too small for what the finished files are judged on; said before the training.
        SystemExit: the training failed.
    """
    torch.manual_seed(options.seed)
    toy = WIDTHS[options.width]
    training, held_out, tokenizer = make_texts(options, toy)
    files = text_files(tokenizer, training, held_out, license_text)
    if options.data_only:
        write_texts(files, folder)
        return ""
    check_held_out(files, options.samples, options.length, toy.vocab_size)
    texts = tuple(text_of(tokenizer, part, options.length + 2, device) for part in (training, held_out))
    counts = torch.bincount(texts[0].ids, minlength=toy.vocab_size).cpu()
    print(f"{len(texts[0].ids):,} tokens to train on, {len(texts[1].ids):,} held out", flush=True)
    model = build(toy, options.seed, device)
    parameters = sum(math.prod(spec.shape) for spec in source_tensors(toy.dims))
    print(f"{parameters:,} parameters on {device}", flush=True)
    schedule = Schedule(options.steps, options.minutes * 60, time.perf_counter())
    schedule.stop_on_signals()
    trained = Trainer(options, model, (texts[0], texts[1])).train(schedule)
    write_native(model, toy, files, folder)
    figures = judge(folder, counts, options.samples, options.length, device)
    story = Training(
        command=command(options.out),
        machine=options.machine or machine(device),
        seed=options.seed,
        steps=trained.steps,
        tokens=trained.steps * options.batch * options.length,
        rounded_steps=trained.rounded_steps,
        seconds=round(trained.seconds, 1),
        corpus_conversations=options.conversations,
        corpus_tokens=len(texts[0].ids) + len(texts[1].ids),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}",
    )
    nbytes = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    (folder / "README.md").write_text(model_card(toy, story, figures, parameters, nbytes), encoding="utf-8")
    return figures_json(story, figures)


def make_texts(
    options: argparse.Namespace, toy: ToyConfig
) -> tuple[list[corpus.Conversation], list[corpus.Conversation], str]:
    """Training and held-out conversations, and the tokenizer.json."""
    begin = time.perf_counter()
    training, held_out = corpus.split(options.seed, options.conversations)
    tokenizer = train_tokenizer(training[:TOKENIZER_CONVERSATIONS], toy.vocab_size)
    print(
        f"{len(training):,} conversations and {len(held_out):,} held out in {time.perf_counter() - begin:.1f} s",
        flush=True,
    )
    return training, held_out, tokenizer


def command(out: Path) -> str:
    """What was typed, for the model card; where OUT lay is nobody's business."""
    words = ["OUT" if Path(word) == out else word for word in sys.argv[1:]]
    return f"python scripts/train_tiny.py {shlex.join(words)}"


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"a CPU ({torch.get_num_threads()} threads)"


if __name__ == "__main__":
    main()
