"""Sums of shares over texts, and the result that they make.

Each text counts once, whatever its length (UBMoE, ICML 2025, section 3 and Table 3). DP depends on
the length: attention that prefers nothing gives main = 1/T and before = after = (T-1)/2T, so that
share stands beside every number.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ubmoe.dependence import COLUMNS, SHARES


@dataclass
class Totals:
    """Sums over the texts measured so far: so small that they are saved and gathered whole."""

    shares: Any = 0.0  # (L, H, 7), once there is a text
    texts: dict[int, tuple[float, ...]] = field(default_factory=dict)  # text -> tokens, COLUMNS

    def add(self, text: int, tokens: int, shares: np.ndarray) -> None:
        self.shares = self.shares + shares
        self.texts[text] = (tokens, *shares.mean((0, 1)))

    def merge(self, other: "Totals") -> None:
        self.shares = self.shares + other.shares
        self.texts |= other.texts


# --- the result -----------------------------------------------------------------------------------


def bucket_of(tokens: int, edges: list[int]) -> int:
    """Index of the bucket (low, high] that a length belongs to, or -1."""
    inside = (number for number, (low, high) in enumerate(pairwise(edges)) if low < tokens <= high)
    return next(inside, -1)


def summary(totals: Totals, edges: list[int]) -> dict[str, Any]:
    """Means in percent: overall, by bucket, layer, head; errors over texts; the uniform share.

    Beside each triple stand `first` and `without_first`, and with them their errors and uniform
    values. `by_text` has the shares of each text, so that models can be compared text by text.
    """
    texts = [totals.texts[text] for text in sorted(totals.texts)]
    count = len(texts)
    layers = totals.shares / count * 100  # (L, H, 7)
    buckets = []
    for number, (low, high) in enumerate(pairwise(edges)):
        members = [text for text in texts if bucket_of(int(text[0]), edges) == number]
        buckets.append({"range": [low, high], **_means(members), "uniform": uniform(members)})
    whole = _means(texts)
    return {
        "overall": {share: whole.pop(share) for share in SHARES},
        **{name: whole[name] for name in ("first", "without_first", "stderr")},
        "uniform": uniform(texts),
        "buckets": buckets,
        "layers": [
            {**named(layer.mean(0)), "heads": [named(head) for head in layer]} for layer in layers
        ],
        "by_text": {
            "tokens": [int(text[0]) for text in texts],
            **{
                name: [round(100 * float(text[place]), 4) for text in texts]
                for place, name in enumerate(COLUMNS, 1)
            },
        },
        "texts": count,
        "outside_buckets": count - sum(bucket["texts"] for bucket in buckets),
        "tokens": sum(int(text[0]) for text in texts),
    }


def named(columns: Iterable[float | None]) -> dict[str, Any]:
    """{main, before, after, first, without_first: {main, before, after}} of the COLUMNS."""
    nested: dict[str, Any] = {}
    for name, value in zip(COLUMNS, columns, strict=True):
        *outer, inner = name.split(".")
        place = nested.setdefault(outer[0], {}) if outer else nested
        place[inner] = None if value is None else float(value)
    return nested


NOTHING = named([None] * len(COLUMNS))


def _means(texts: list[tuple[float, ...]]) -> dict[str, Any]:
    """Mean and standard error over texts, in percent; null where there are too few."""
    shares = np.array([text[1:] for text in texts]).reshape(-1, len(COLUMNS)) * 100
    stderr = NOTHING
    if len(texts) > 1:
        stderr = named(shares.std(0, ddof=1) / len(texts) ** 0.5)
    return {"texts": len(texts), **(named(shares.mean(0)) if texts else NOTHING), "stderr": stderr}


def uniform(texts: list[tuple[float, ...]]) -> dict[str, Any]:
    """The shares of uniform attention on the same lengths, in percent.

    Without the first key its own row has all of its attention after it, and every other row T - 1
    keys: main 1/T, before (T - 2) / 2T, after 1/2.
    """
    if not texts:
        return NOTHING
    lengths = np.array([text[0] for text in texts])
    one, other = 1 / lengths, (lengths - 1) / (2 * lengths)
    several = lengths > 1  # of a text of one token nothing is left
    without = (one * several, np.maximum(lengths - 2, 0) / (2 * lengths), several / 2)
    columns = (one, other, other, one, *without)
    return named([column.mean() * 100 for column in columns])
