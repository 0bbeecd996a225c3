"""95 % intervals by the bootstrap: items drawn anew, many draws at a time.

The one bootstrap here, and not scipy's: items of the same number get the same draws, so that any
two intervals are of paired draws; and a draw is how often it holds each item, so that all means of
a draw are one matrix product. Ranks in a draw follow from these counts and from the order of the
items, so that nothing is sorted again: Spearman's of 500 pairs takes 0.05 ms a draw.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 500_000  # counts: a few arrays as large as these stand in memory together
KEPT = 2_500_000  # counts of 20 MB: of fewer, as of 200 texts, the draws are kept


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of what the draws gave; a draw that gives nothing (nan) is passed over."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def means(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(RESAMPLES, ...) sums of `values` over sums of `weights`, in items drawn anew.

    values: (..., items); weights: (items,), None: 1 each. Every row of values has the same draws,
    so that a difference of two is a paired one.
    """
    items = values.shape[-1]
    weights = np.ones(items) if weights is None else weights
    drawn = []
    with np.errstate(invalid="ignore"):  # a draw of items without weight
        for counts in draws(items):
            whole = (counts @ weights).reshape(-1, *[1] * (values.ndim - 1))
            drawn.append(np.moveaxis(values @ counts.T, -1, 0) / whole)
    return np.concatenate(drawn)


def correlations(
    values: np.ndarray,
    gold: np.ndarray,
    resamples: int | None = None,
    families: Sequence[str] | None = None,
) -> np.ndarray:
    """(resamples,) of Spearman(values, gold), over items drawn anew; None: RESAMPLES.

    families: of which each item is; what belongs together is drawn together.
    """
    members = np.arange(len(gold))
    if families is not None:
        members = np.unique(list(families), return_inverse=True)[1]
    counts = draws(int(members.max()) + 1, resamples)
    return np.concatenate([spearman(count[:, members], values, gold) for count in counts])


def draws(items: int, resamples: int | None = None) -> Iterator[np.ndarray]:
    """Counts (draws, items), together `resamples` or RESAMPLES: the same for the same items."""
    total, size = resamples or RESAMPLES, max(1, AT_ONCE // items)
    return iter(_kept(items, total, size)) if items * total <= KEPT else _drawn(items, total, size)


@lru_cache(maxsize=4)
def _kept(items: int, total: int, size: int) -> tuple[np.ndarray, ...]:
    """Drawing takes five times as long as what is done with a draw."""
    kept = tuple(_drawn(items, total, size))
    for counts in kept:
        counts.flags.writeable = False
    return kept


def _drawn(items: int, total: int, size: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for begin in range(0, total, size):
        yield rng.multinomial(items, np.full(items, 1 / items), min(size, total - begin))


def spearman(counts: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(draws,) Spearman's correlation in each draw; counts: (draws, items)."""
    items = counts.sum(1, keepdims=True)
    centred = [
        ranks(counts, values) - (items + 1) / 2 for values in (one, other)
    ]  # their mean, always
    covariance, first, second = (
        (counts * a * b).sum(1)
        for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)
    )
    with np.errstate(invalid="ignore"):  # a draw of one value throughout
        return covariance / np.sqrt(first * second)


def ranks(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(draws, items) the rank of each item in each draw, equal values sharing their mean rank."""
    different, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(different)))
    together = np.add.reduceat(counts[:, order], starts, axis=1)  # (draws, different values)
    mean = together.cumsum(1) - (together - 1) / 2
    return mean[:, place]
