"""Word vectors: the mean of a word's sub-word states, in every layer, streamed to disk.

A word is a span of characters of its sentence, so contractions, scripts without spaces and repeated
words are all the same: its tokens are those whose characters overlap the span.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.config import UserError
from ubmoe.data.padding import batches_by_length, padded_with_mask
from ubmoe.data.tokens import check_ids
from ubmoe.files import digest_of_file
from ubmoe.unfinished import Unfinished

log = logging.getLogger(__name__)
POSITIONS = ("same", "previous")


@dataclass(frozen=True)
class Word:
    """A span of characters, [start, end), of a sentence."""

    sentence: str
    start: int
    end: int


@dataclass(frozen=True)
class Place:
    """Token indices of a word in its sentence's row, at both positions.

    `previous` is each token's predecessor, from which a causal head predicts it; a word that begins
    its row has none, and keeps its own position.
    """

    row: int
    same: list[int]
    previous: list[int]


class Sentences:
    """Sentences as tokens, with the places of words in them.

    Words of a sentence that was cut before them have no place (None). Raises UserError for a
    tokenizer without offsets and for a word that no token overlaps.
    """

    def __init__(
        self, words: Sequence[Word], tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer gives no offsets")
        unique = list(dict.fromkeys(word.sentence for word in words))
        encoded: Any = tokenizer(unique, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        for sentence, ids in zip(unique, encoded["input_ids"], strict=True):
            check_ids(tokenizer, ids, repr(sentence))
        self.ids = [ids[:max_tokens] for ids in encoded["input_ids"]]
        rows = {sentence: row for row, sentence in enumerate(unique)}
        self.places = [self._place(word, rows[word.sentence], offsets) for word in words]

    def _place(self, word: Word, row: int, offsets: Any) -> Place | None:
        tokens = overlapping(offsets[row], word.start, word.end)
        if not tokens:
            raise UserError(f"no token of {word.sentence!r} lies at {word.start}-{word.end}")
        if tokens[-1] >= len(self.ids[row]):
            return None
        first = tokens[0] == 0
        return Place(row, tokens, tokens if first else [token - 1 for token in tokens])


def overlapping(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Tokens that hold a character of [start, end); special tokens hold none."""
    return [
        token
        for token, (low, high) in enumerate(offsets)
        if low < end and high > start < high > low
    ]


def word_vectors(
    model: PreTrainedModel,
    sentences: Sentences,
    path: Path,
    layers: Sequence[int],
    batch_tokens: int,
    key: str,
    positions: Sequence[str] = POSITIONS,
) -> np.ndarray:
    """(words, len(positions), len(layers), D) float32, memory-mapped from `path`; NaN without a
    place.

    layers: 0 is the embeddings, the last is after the final norm, as the library gives it. A file
    of the same words and `key` (which says what else the vectors depend on) is reused. Raises
    UserError for a vector that is not finite, as of a model that overflows in float16.
    """
    width = model.config.get_text_config().hidden_size
    shape = (len(sentences.places), len(positions), len(layers), width)
    made_of = {"key": key, "words": _digest(sentences), "layers": list(layers)}
    seal = Unfinished(path.with_suffix(".npz"), made_of | {"positions": list(positions)})
    if path.exists() and (kept := seal.load("digest")):
        if str(kept[0]) == digest_of_file(path):
            return np.load(path, mmap_mode="r")
        log.info("%s: not as it was written; made anew", path)
    seal.remove()  # first: half a file must have no seal
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("word vectors: %.2f GB to %s", 4e-9 * math.prod(shape), path)
    vectors = reserved(path, shape)
    vectors[[place is None for place in sentences.places]] = np.nan
    by_row: dict[int, list[int]] = {}
    for number, place in enumerate(sentences.places):
        if place is not None:
            by_row.setdefault(place.row, []).append(number)
    rows = sorted(by_row)
    batches = batches_by_length([sentences.ids[row] for row in rows], batch_tokens)
    total = sum(len(sentences.ids[row]) for row in rows)
    with tqdm(total=total, desc="word vectors", unit="token", disable=None) as bar:
        for batch in batches:
            chosen = [rows[index] for index in batch]
            states = hidden_states(model, [sentences.ids[row] for row in chosen], layers)
            numbers = [number for row in chosen for number in by_row[row]]
            lines = {row: line for line, row in enumerate(chosen)}
            places = [sentences.places[number] for number in numbers]
            tokens = [
                [(lines[place.row], token) for token in getattr(place, name)]
                for name in positions
                for place in places
                if place is not None
            ]
            averaged = (
                means(states, tokens).cpu().numpy()
            )  # the words at one position, then the next
            if not np.isfinite(averaged).all():
                raise UserError(
                    f"{model.name_or_path}: word vectors that are not finite in "
                    f"{str(model.dtype).removeprefix('torch.')}; expected model.dtype=float32"
                )
            for position, part in enumerate(np.split(averaged, len(positions))):
                vectors[numbers, position] = part
            bar.update(sum(len(sentences.ids[row]) for row in chosen))
    vectors.flush()
    seal.save(digest=digest_of_file(path))
    return np.load(path, mmap_mode="r")


def reserved(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file of float32 with all its space on the disk: a memory map that met a full disk
    would kill the process. Raises OSError.
    """
    vectors = open_memmap(path, "w+", np.float32, shape)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return vectors


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rows: list[list[int]], layers: Sequence[int]) -> Tensor:
    """(len(layers), B, T, D): the embeddings are layer 0, then every layer's output."""
    inputs = {name: value.to(model.device) for name, value in padded_with_mask(rows).items()}
    output: Any = model.base_model(**inputs, output_hidden_states=True, use_cache=False)
    return torch.stack([output.hidden_states[layer] for layer in layers])


def means(states: Tensor, words: list[list[tuple[int, int]]]) -> Tensor:
    """(W, L, D) float32 means over the (row, token) places of each of W words."""
    length = states.shape[2]
    flat = [row * length + token for word in words for row, token in word]
    owner = [number for number, word in enumerate(words) for _ in word]
    device = states.device
    taken = states.flatten(1, 2)[:, torch.tensor(flat, device=device)].float()
    sums = torch.zeros(len(states), len(words), states.shape[-1], device=device)
    sums.index_add_(1, torch.tensor(owner, device=device), taken)
    counts = torch.tensor([len(word) for word in words], device=device)
    return (sums / counts[None, :, None]).transpose(0, 1)


def _digest(sentences: Sentences) -> str:
    places = [None if p is None else (p.row, p.same, p.previous) for p in sentences.places]
    return hashlib.sha256(json.dumps([sentences.ids, places]).encode()).hexdigest()
