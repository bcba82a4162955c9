"""What data to read, as one frozen object, and how messages speak of it.

`Calibration` is the `calibration` section of a config. Other uses of the same loaders have a DataSpec of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dsv4q.errors import DataError


@dataclass(frozen=True)
class Wording:
    """Words for the data and for what the user sets, in the messages of the loaders."""

    purpose: str
    """What the data is for: "The {purpose} data is empty"."""
    dataset: str
    samples: str
    max_length: str
    split: str
    """What would choose one of several."""
    choose_split: str
    """What to do where none is chosen, or one that is not there."""


class DataSpec(BaseModel):
    """What data is asked for. Frozen; an unknown key is refused.

    Raises:
        ValidationError: a value of the wrong type or below its least one.
        DataError: a seed below 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    words: ClassVar[Wording] = Wording(
        purpose="calibration",
        dataset="calibration.dataset",
        samples="calibration.samples",
        max_length="calibration.max_length",
        split="calibration.split",
        choose_split="set calibration.split, or --split, to one of those found",
    )

    dataset: str
    """Hub id, local dataset folder, or a JSONL, JSON or parquet file; where a relative path starts is the loader's."""
    split: str | None = None
    """Split of a hub dataset or a folder. A single file has none, and there it has no effect."""
    samples: int = Field(64, ge=1)
    max_length: int = Field(512, ge=1)
    """Tokens per sample; every sample has exactly this many."""
    micro_batch: int = Field(8, ge=1)
    """Samples per forward pass, the last one may have fewer. Part of a recipe: another value may change the last bit
    of a scale."""
    seed: int = 42
    """Of the order of the rows."""
    chat_mode: Literal["chat", "thinking"] = "chat"
    """See `tokens.encode_chat`."""

    @field_validator("seed")
    @classmethod
    def _is_seed(cls, seed: int) -> int:
        if seed < 0:  # `random.Random` would take it for its positive twin
            raise DataError(
                "The calibration cannot have this value", where="calibration.seed", expected="at least 0", found=seed
            )
        return seed

    @property
    def tokens(self) -> int:
        return self.samples * self.max_length


class Calibration(DataSpec):
    """Section `calibration` of a config: which data the activation statistics come from."""

    max_length: int = Field(512, ge=8)
