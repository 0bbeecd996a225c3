"""The largest step of a run: batches that are drawn as the run draws them, from its own rows."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ubmoe.config import MINI_BATCH, StageSection, TrainingSection
from ubmoe.data.chats import Chat
from ubmoe.dry_run.memory import Batch
from ubmoe.dry_run.shipped import Unread
from ubmoe.encoder.contrastive_loss import least_padding

SAMPLE = 1000  # rows whose lengths are looked at
DRAWN = 50  # batches, of which the largest counts


def token_counts(texts: Sequence[str], tokenizer: Any, prompt: str | None, most: int) -> list[int]:
    """Tokens of each text in its prompt, cut at `most`."""
    prompted = [(prompt or "{text}").replace("{text}", text) for text in texts]
    return [len(ids) for ids in tokenizer(prompted, truncation=True, max_length=most)["input_ids"]]


def largest(
    rows: int, section: TrainingSection, of: Callable[[list[int]], list[Batch]]
) -> list[Batch]:
    """The forwards of the largest of the steps; `of` gives those of a batch of row numbers."""
    drawn = [of(batch) for batch in _drawn(rows, section)]
    return max(drawn, key=lambda forwards: sum(batch.padded for batch in forwards))


def _drawn(rows: int, section: TrainingSection) -> Iterator[list[int]]:
    generator = random.Random(0)
    count = min(rows, section.per_device_train_batch_size)
    for _ in range(max(1, min(DRAWN, section.steps(rows)))):
        yield generator.sample(range(rows), count)


def of_stage(stage: StageSection, data: Any, tokenizer: Any, prompt: str | None) -> list[Batch]:
    """The forwards of a stage's largest step; cached, only the largest of them is held at once."""
    if stage.objective == "mntp":
        texts, tokens = stage.per_device_train_batch_size, data.shape[1]
        return [Batch(texts, tokens, math.ceil(texts * tokens * stage.mlm_probability))]
    places = np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int)
    lengths = _lengths(stage, data, places, tokenizer, prompt)
    tokens = MINI_BATCH if stage.mini_batch_tokens == "auto" else stage.mini_batch_tokens

    def mini_batches(batch: list[int]) -> list[Batch]:
        sizes = sorted(column[row] for column in lengths for row in batch)
        ranges = least_padding(sizes, tokens)
        return [Batch(high - low, sizes[high - 1]) for low, high in ranges]

    most = largest(len(places), stage, mini_batches)
    return [max(most, key=lambda batch: batch.padded)] if stage.cached else most


def _lengths(
    stage: StageSection, data: Any, places: Any, tokenizer: Any, prompt: str | None
) -> list[list[int]]:
    """Tokens of the rows at `places`, by column."""
    if isinstance(data, Unread):
        columns = 2 if stage.objective == "simcse" else 3  # with one hard negative
        return [[stage.max_tokens] * len(places)] * columns
    some = data.select(places)
    return [
        token_counts(some[name], tokenizer, prompt, stage.max_tokens) for name in data.column_names
    ]


def of_chats(
    section: TrainingSection, chats: Sequence[Chat] | Unread, max_tokens: int
) -> list[Batch]:
    """The largest batch of chats, and how many of its tokens are answers."""
    if isinstance(chats, Unread):
        texts = min(len(chats), section.per_device_train_batch_size)
        return [Batch(texts, max_tokens, texts * max_tokens)]

    def one(batch: list[int]) -> list[Batch]:
        some = [chats[row] for row in batch]
        answers = sum(sum(chat.answer) for chat in some)
        return [Batch(len(some), max(len(chat.ids) for chat in some), answers)]

    return largest(len(chats), section, one)
