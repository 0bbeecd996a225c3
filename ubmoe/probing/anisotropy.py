"""Anisotropy by layer: how alike word vectors are, of different sentences and inside one."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ubmoe.config import ProbingSection
from ubmoe.probing.items import Task, tokens
from ubmoe.probing.word_vectors import Sentences, word_vectors

SAMPLED = 1000  # word vectors, as in the paper
WHOLE = 200  # sentences all of whose words are compared


def anisotropy(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    path: Path,
    count: int,
    settings: ProbingSection,
    keys: dict[str, Any],
) -> dict[str, list[float | None]]:
    """By layer: mean cosine of sampled word vectors, and of the words inside a sentence.

    None where there are no two words to compare.
    """
    pool = [word for task in tasks if task.paired for words in task.words for word in words]
    pool = pool or [word for task in tasks for words in task.words for word in words]
    rng = np.random.default_rng(0)
    pool = list(dict.fromkeys(pool))
    sampled = [pool[row] for row in rng.permutation(len(pool))[:SAMPLED]]
    whole = [tokens(sentence) for sentence in dict.fromkeys(word.sentence for word in sampled)]
    whole = [words for words in whole if len(words) > 1][:WHOLE]
    words = [*sampled, *(word for sentence in whole for word in sentence)]
    sentences = Sentences(words, tokenizer, settings.max_tokens)
    file = path.with_name(f"{path.name}-layers.npy")
    vectors = word_vectors(model, sentences, file, list(range(count)), **keys, positions=["same"])
    vectors = vectors[:, 0]
    ends = np.cumsum([len(sampled), *(len(sentence) for sentence in whole)])
    inside = list(zip(ends[:-1], ends[1:], strict=True))
    return {
        name: [
            mean_of_known([cosine_of_known(vectors[a:b, layer]) for a, b in spans])
            for layer in range(count)
        ]
        for name, spans in {"between": [(0, len(sampled))], "within": inside}.items()
    }


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def cosine_of_known(vectors: np.ndarray) -> float | None:
    there = vectors[~np.isnan(vectors).any(1)]
    return mean_cosine(there) if len(there) > 1 else None


def mean_cosine(vectors: np.ndarray) -> float:
    """Mean cosine of all pairs of (W, D) vectors: the squared length of the mean direction, without
    each vector's own.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    count = len(unit)
    return float(((unit.sum(0) ** 2).sum() - count) / (count * (count - 1)))
