"""What a server is asked: our own fixed prompts, from 70 to 6,000 characters, or those of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4q.errors import DataError

Message = dict[str, str]

MAX_FILE = 256 << 20


def _orders(count: int) -> str:
    """A table that no server has seen, to make a long prompt of."""
    goods = ("tea", "rope", "lamp oil", "paper", "salt", "glass beads", "copper wire")
    towns = ("Ostby", "Varn", "Little Harrow", "Quent", "Saltmere")
    rows = [
        f"{number}. {goods[number * 5 % 7]}, {number * 37 % 211 + 3} crates to {towns[number * 3 % 5]}, "
        f"{number * 61 % 89 + 1} shillings a crate, due on day {number * 17 % 28 + 1}"
        for number in range(1, count + 1)
    ]
    return "\n".join(rows)


DEFAULT = (
    "Explain in a few sentences why the sky is blue but a sunset is red.",
    "Write a Python function that merges overlapping intervals. Give its docstring, type hints and three tests.",
    "A tank is filled by one pipe in 6 hours and by another in 4 hours; a drain empties it in 12 hours. All three are "
    "open and the tank is a quarter full. How long until it is full? Show every step.",
    "Translate into German and into French, then list the words that have no close equivalent: 'The harbour master "
    "squinted at the ledger, muttered something about the tide, and waved the little boat through without a fee.'",
    "Write a short story of about 300 words about a lighthouse keeper who finds a letter that was meant for somebody "
    "else. It should have two scenes and end with a question.",
    "Compare a B-tree, a hash index and an LSM tree as the index of a table with many inserts and few range queries. "
    "Say for each of them what a read costs, what a write costs, and what happens after a crash.",
    "Here are the orders of a trading post.\n\n"
    + _orders(24)
    + "\n\nWhich town gets the most crates in all, and which "
    "order is worth the most? Then write a one-paragraph note to the carter.",
    "Here are the orders of a trading post for one month.\n\n" + _orders(80) + "\n\nGroup them by town, give the value "
    "of each group, and name the three days on which most is due. Then propose in which order to deliver.",
)
"""Single questions: text, code, arithmetic, translation, a story, an argument, and two long tables."""


def load_prompts(path: Path | None) -> list[list[Message]]:
    """Chats to ask: each a list of messages that ends with the user's.

    Args:
        path: JSONL with `messages`, `prompt` or `text` in each row, or else one prompt per line; None: our own.

    Raises:
        DataError: absent, not UTF-8, too large, without a prompt, or with a row that is none.
    """
    if path is None:
        return [[_user(prompt)] for prompt in DEFAULT]
    try:
        if path.stat().st_size > MAX_FILE:
            most, size = f"at most {MAX_FILE:,} bytes", f"{path.stat().st_size:,} bytes"
            raise DataError("The file of prompts is too large", where=path, expected=most, found=size)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("The file of prompts cannot be read", where=path, found=error) from error
    plain = path.suffix not in (".jsonl", ".json")
    chats = [
        [_user(line)] if plain else _chat(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not chats:
        raise DataError("The file of prompts is empty", where=path, expected="one prompt per line, or JSONL")
    return chats


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _chat(line: str, where: str) -> list[Message]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError("A row of the file of prompts is not JSON", where=where, found=error) from error
    if isinstance(row, str):
        return [_user(row)]
    text = next((row[key] for key in ("prompt", "text") if key in row), None) if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(text, str):
        return [_user(text)]
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        # The answer that a data set has at the end is what the server shall write.
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if asked:
            return [{"role": m["role"], "content": m["content"]} for m in asked]
    raise DataError(
        "A row of the file of prompts has no prompt",
        where=where,
        expected="a string, or an object with `prompt`, `text` or `messages` (role and content each)",
        found=line[:80],
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
