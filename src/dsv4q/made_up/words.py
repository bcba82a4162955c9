"""The texts of a toy: conversations, a tokenizer trained on them, and the small files that a release has."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from dsv4q.data.tokens import ASSISTANT, BOS, EOS, PAD, THINK, THINK_END, USER

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, THINK_END)
"""Ids 0 to 6 of the toy tokenizer. The first three are special, the rest plain added tokens, as in the release."""

CONVERSATIONS = 256
"""About 360 tokens each: enough for 64 samples of 512 tokens, the shipped configs' calibration."""

LICENSE = """MIT License

Copyright (c) 2023 DeepSeek

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

ENCODING_README = f"""# Chat encoding

A conversation is plain text for the tokenizer; there is no Jinja template.

    {BOS}SYSTEM{USER}QUESTION{ASSISTANT}{THINK_END}ANSWER{EOS}

In thinking mode an answer is {THINK}REASONING{THINK_END}ANSWER instead.
"""

TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": SPECIAL_TOKENS[0],
    "clean_up_tokenization_spaces": False,
    "eos_token": SPECIAL_TOKENS[1],
    "model_max_length": 1048576,
    "pad_token": SPECIAL_TOKENS[2],
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def pretty_json(value: object) -> str:
    """A small JSON file's text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def train_tokenizer(conversations: Sequence[list[dict[str, str]]], vocab_size: int) -> str:
    """Train a byte-level BPE on the conversations' text; returns the tokenizer.json.

    It has at most `vocab_size` tokens: fewer when the text holds no more pairs to merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for messages in conversations for m in messages), trainer)
    parsed = json.loads(tokenizer.to_str())
    for token in parsed["added_tokens"]:
        token["special"] = token["id"] < 3  # the trainer can only add special ones; the release's role marks are not
    return pretty_json(parsed)


_THINGS = (
    "a lighthouse", "the old harbour", "a paper kite", "the northern market", "a copper kettle", "the night train",
    "a walnut table", "the village school", "a field of barley", "the stone bridge", "a violin", "the water mill",
    "a greenhouse", "the winter coast", "a clay oven", "the city library", "a fishing boat", "the mountain road",
)  # fmt: skip
_DEEDS = (
    "repair", "describe", "paint", "measure", "compare", "explain", "draw", "name", "plan", "clean", "photograph",
    "restore", "visit", "translate the story of", "write a short poem about", "estimate the cost of",
)  # fmt: skip
_REASONS = (
    "because the weather changes quickly", "since nobody has done it before", "so that the children can use it",
    "although it will take three weeks", "before the first snow falls", "while the river is still low",
    "as my grandmother always did", "even if the tools are simple", "when the guests arrive in June",
    "unless the price rises by 12 percent", "after the festival in März", "with only 45 euros to spend",
)  # fmt: skip
_STEPS = (
    "Begin with a list of what you already have", "Look closely at the edges and the joints",
    "Ask the people who live nearby", "Write each number down twice", "Let everything dry for about 8 hours",
    "Choose the lighter of the two colours", "Start early, because the light is better",
    "Keep a small note of every change", "Check the result against the first sketch",
    "Work from the left to the right", "Stop as soon as the surface feels warm", "Use cold water and a soft cloth",
)  # fmt: skip
_SYSTEMS = ("You are a patient craftsman.", "Answer briefly and name your reasons.", "You are a helpful assistant.")


def chat_samples(count: int = CONVERSATIONS) -> list[list[dict[str, str]]]:
    """`count` conversations of two to four exchanges, a third of them with a system message; always the same ones."""
    rng = random.Random("dsv4q chat samples")

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.random() * len(words))]  # Python promises the same random() in every version, not choice()

    def conversation() -> Iterator[dict[str, str]]:
        if rng.random() < 1 / 3:
            yield {"role": "system", "content": pick(_SYSTEMS)}
        for _ in range(2 + int(rng.random() * 3)):
            deed, thing = pick(_DEEDS), pick(_THINGS)
            yield {"role": "user", "content": f"How would you {deed} {thing} {pick(_REASONS)}?"}
            steps = " ".join(f"{pick(_STEPS)} {pick(_REASONS)}." for _ in range(3))
            yield {"role": "assistant", "content": f"To {deed} {thing}, think of {pick(_THINGS)} first. {steps}"}

    return [list(conversation()) for _ in range(count)]
