"""What a trained tiny model becomes: a checkpoint in the official layout in its place, its figures, its model card."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from corpus import Conversation
from dsv4q.checkpoint.native import open_source, release_form
from dsv4q.data.spec import DataSpec
from dsv4q.data.tokens import load_calibration, load_tokenizer
from dsv4q.errors import DataError, OutputError, SourceError
from dsv4q.layout import Dims, TensorSpec, source_tensors
from dsv4q.made_up.native import native_form, stored_specs
from dsv4q.made_up.toy import ToyConfig, ToyForm, write_toy
from dsv4q.model.model import build_meta_model, rebuild_rotary, set_tensor
from train_tiny_model import of_model, set_rounding
from train_tiny_rounding import encoded

LICENSE = Path(__file__).parent.parent / "LICENSE"
CALIBRATION_CONVERSATIONS = 400
HELD_OUT_CONVERSATIONS = 640
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


def read_license() -> str:
    """The project's license, which the checkpoint is under too.

    Raises:
        SourceError: absent or unreadable.
    """
    try:
        return LICENSE.read_text(encoding="utf-8")
    except OSError as error:
        hint = "run the script in a whole checkout"
        raise SourceError(
            "The project's license is not there", where=LICENSE, found=error.strerror, hint=hint
        ) from error


def text_files(
    tokenizer: str, training: Sequence[Conversation], held_out: Sequence[Conversation], license_text: str
) -> dict[str, str]:
    """Name -> text: tokenizer, calibration data, held-out text and license."""
    return {
        "tokenizer.json": tokenizer,
        "chat_samples.jsonl": _lines(training[:CALIBRATION_CONVERSATIONS]),
        "heldout.jsonl": _lines(held_out[:HELD_OUT_CONVERSATIONS]),
        "LICENSE": license_text,
    }


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """An empty folder on the disk of `out`, which becomes `out` at the end; after an error nothing of it is left.

    Raises:
        OutputError: no folder can be made there, or in the meantime somebody else has made `out`.
    """
    out = out.resolve()
    if out.is_mount():
        hint = "give a new folder inside it"
        raise OutputError("The output folder is a mount point and cannot be replaced", where=out, hint=hint)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError("The output folder cannot be made", where=out, found=error.strerror) from error
    folder = work / out.name
    try:
        folder.mkdir()
        yield folder
    except BaseException:
        shutil.rmtree(work)
        raise
    try:
        os.replace(folder, out)
    except OSError as error:
        hint = f"what was to be there is finished: {folder}"
        raise OutputError("The output folder has been taken", where=out, found=error.strerror, hint=hint) from error
    work.rmdir()


def write_native(model: nn.Module, toy: ToyConfig, texts: Mapping[str, str], out: Path) -> None:
    """The trained model as the official release stores it, with the files `texts` (name -> text).

    Raises:
        OutputError: `out` is not empty or cannot be written.
    """
    set_rounding(model, False)

    def values(spec: TensorSpec, _dims: Dims, _seed: int) -> tuple[Tensor, ...]:
        form, tensor = release_form(spec), of_model(model, spec).detach()
        if not bool(torch.isfinite(tensor).all()):
            raise SystemExit(f"the trained model has a value that is not finite in {spec.name}")
        return encoded(tensor, form) if form else (tensor.to("cpu", _DTYPES[spec.dtype]),)

    write_toy(out, toy, form=ToyForm(config=native_form().config, stored=stored_specs, values=values, texts=texts))


def write_texts(texts: Mapping[str, str], out: Path) -> None:
    """The files `texts` (name -> text) into the folder `out`."""
    for name, text in texts.items():
        (out / name).write_bytes(text.encode())


def _lines(conversations: Sequence[Conversation]) -> str:
    return "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)


# ------------------------------------------------------------------------------------------ figures


def check_held_out(texts: Mapping[str, str], samples: int, length: int, vocab_size: int) -> None:
    """Read the held-out text as `judge` will.

    Raises:
        DataError: it has too few tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_texts(texts, Path(folder))
        try:
            _held_out(Path(folder), samples, length, vocab_size)
        except DataError as error:
            raise DataError(
                "There is too little held-out text to judge the model on",
                where="--samples, --length",
                expected=error.expected,
                found=error.found or error.what,
                hint="lower them, or raise --conversations",
            ) from error


def _held_out(folder: Path, samples: int, length: int, vocab_size: int) -> tuple[Tensor, ...]:
    """Token ids of the held-out text, I64 [8, length] each, packed as `dsv4q eval` packs it."""
    data = DataSpec(dataset=str(folder / "heldout.jsonl"), samples=samples, max_length=length, micro_batch=8, seed=0)
    return load_calibration(data, load_tokenizer(folder), vocab_size=vocab_size).batches


@dataclass(frozen=True)
class Figures:
    """Of the finished files, read again: BF16 weights, the transformers model, held-out text."""

    tokens: int
    """Predicted tokens."""
    perplexity: float
    unigram_perplexity: float
    """Of a model that knows how often each token occurs in the training text, and nothing else."""
    accuracy: float
    """How often the main model's first choice is the text's next token."""
    acceptance: float
    """How often the draft's first choice for the token after next is what the main model then says."""
    chance: float
    """Acceptance of a draft that always says the main model's most frequent choice."""
    least_expert_share: float
    """Tokens of the least used expert of all score-routed layers, as a share of the mean."""


@torch.no_grad()
def judge(folder: Path, counts: Tensor, samples: int, length: int, device: torch.device) -> Figures:
    """Figures of a native checkpoint.

    Args:
        counts: [V] how often each token occurs in the training text.
        samples, length: of the held-out text.
    """
    with open_source(folder) as source:
        dims = Dims.from_config(source.config)
        model = build_meta_model(source.config, str(folder))
        for spec in source_tensors(dims):
            set_tensor(model, spec.hf_name, source.tensor(spec.name).to(device))
    rebuild_rotary(model, device)
    seen = _watch_routers(model, dims.experts)
    batches = _held_out(folder, samples, length, dims.vocab)
    unigram = ((counts.double() + 1) / (counts.sum() + dims.vocab)).log()
    loss = unigram_loss = 0.0
    tokens = right = accepted = drafts = 0
    choices = torch.zeros(dims.vocab, dtype=torch.int64)
    for batch in batches:
        ids = batch.to(device)
        streams = model.residual_streams(ids)
        logits = model.lm_head(model.model.norm(model.model.hc_head(streams))).float()
        greedy = logits.argmax(-1)
        loss += float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        unigram_loss -= float(unigram[batch[:, 1:]].sum())
        right += int((greedy[:, :-1] == ids[:, 1:]).sum())
        draft = model.draft_logits(streams[:, :-1], ids[:, 1:]).float().argmax(-1)
        accepted += int((draft == greedy[:, 1:]).sum())
        tokens, drafts = tokens + ids[:, 1:].numel(), drafts + draft.numel()
        choices += torch.bincount(greedy[:, 1:].flatten().cpu(), minlength=dims.vocab)
    return Figures(
        tokens,
        math.exp(loss / tokens),
        math.exp(unigram_loss / tokens),
        right / tokens,
        accepted / drafts,
        int(choices.max()) / int(choices.sum()),
        min(float(count.min() / count.float().mean()) for count in seen),
    )


def _watch_routers(model: nn.Module, experts: int) -> list[Tensor]:
    """I64 [E] per score-routed layer, which count the tokens of each expert from now on."""
    counts: list[Tensor] = []

    def counting(count: Tensor) -> Any:
        def see(_: nn.Module, __: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
            count.add_(torch.bincount(out[2].flatten().cpu(), minlength=experts))

        return see

    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            counts.append(torch.zeros(experts, dtype=torch.int64))
            module.register_forward_hook(counting(counts[-1]))
    return counts


# ------------------------------------------------------------------------------------------ model card


@dataclass(frozen=True)
class Training:
    """How a model came about."""

    command: str
    machine: str
    seed: int
    steps: int
    tokens: int
    """Training tokens seen."""
    rounded_steps: int
    """Steps with rounded weights, the last ones."""
    seconds: float
    corpus_conversations: int
    corpus_tokens: int
    versions: str


def model_card(toy: ToyConfig, training: Training, figures: Figures, parameters: int, nbytes: int) -> str:
    """README.md of the checkpoint."""
    ratios = ", ".join(map(str, toy.compress_ratios))
    return f"""---
license: mit
language: en
tags: [deepseek_v4, mtp, mxfp4, fp8, test]
---

# A tiny trained DeepSeek-V4 with MTP

The architecture of DeepSeek-V4 at a small size, really trained, stored as the official release is: routed experts MXFP4,
attention, shared experts and MTP projections FP8 128x128 with power-of-two scales. It is the input of demo and tests,
and good for nothing else: it knows an invented country, little stories, sums and lists.

| | |
|---|---|
| parameters | {parameters:,}, {nbytes / 1e6:.1f} MB of tensors in the native layout |
| layers | {len(toy.compress_ratios)} with compress ratios {ratios}; the first {toy.num_hash_layers} route by hash; {toy.num_nextn_predict_layers} MTP layer |
| width | hidden {toy.hidden_size}, {toy.n_routed_experts} experts of {toy.moe_intermediate_size}, {toy.num_experts_per_tok} for each token and {toy.n_shared_experts} shared, {toy.hc_mult} residual streams |
| vocabulary | {toy.vocab_size}, byte-level BPE |

## Data

`scripts/corpus.py` makes all of it: conversations in simple English, as a function of a seed, with no text of anybody
else. `heldout.jsonl` was never trained on: the split goes by a hash of the text. `chat_samples.jsonl`, for calibration,
is a part of the training text. Both, like the weights, are under the MIT license of this project (LICENSE).
Corpus: {training.corpus_conversations:,} conversations, {training.corpus_tokens:,} tokens.

## Training

    {training.command}

{training.steps:,} steps, {training.tokens:,} tokens, seed {training.seed}, {training.seconds:.0f} s on {training.machine} ({training.versions}).
AdamW, cosine schedule; loss of the main model + 0.3 times that of the MTP layer; the router's bias balances the experts;
the indexer learns what attention looks at (KL divergence), for its choice of entries gives no gradient. The last
{training.rounded_steps:,} steps ran with experts rounded to MXFP4 and linears to FP8 (straight-through), and the files hold exactly these
values. Another run with the same seed on a GPU differs in the last digits.

## Figures

Of these files, read again, in BF16, on {figures.tokens:,} tokens of held-out text:

| | |
|---|---|
| perplexity | {figures.perplexity:.3f} |
| perplexity of the unigram model | {figures.unigram_perplexity:.1f} |
| top-1 accuracy | {figures.accuracy:.3f} |
| MTP top-1 acceptance, 1 step | {figures.acceptance:.3f} |
| acceptance by always naming the most frequent choice | {figures.chance:.3f} |
| tokens of the least used expert of a score-routed layer, of the mean | {figures.least_expert_share:.2f} |
"""  # noqa: E501 - a table


def figures_json(training: Training, figures: Figures) -> str:
    return json.dumps({"figures": asdict(figures), "training": asdict(training)}, indent=2)
