"""Ranks from counts, against ranks of the drawn pairs themselves."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from ubmoe.scan import intervals

RNG = np.random.default_rng(0)
GOLD = RNG.integers(0, 6, 40) / 2  # with ties, as STS scores have them
MINE, THEIRS = GOLD + RNG.normal(size=40), np.round(GOLD + 2 * RNG.normal(size=40), 1)
COUNTS = RNG.multinomial(40, np.full(40, 1 / 40), 5)


@pytest.mark.parametrize("values", [GOLD, MINE, THEIRS])
def test_ranks_are_those_of_the_drawn_pairs(values):
    found = intervals.ranks(COUNTS, values)
    for counts, own in zip(COUNTS, found, strict=True):
        drawn = np.repeat(np.arange(40), counts)
        assert own[drawn].tolist() == rankdata(values[drawn]).tolist()


def test_correlations_are_those_of_the_drawn_pairs():
    found = intervals.spearman(COUNTS, THEIRS, GOLD)
    for counts, own in zip(COUNTS, found, strict=True):
        drawn = np.repeat(np.arange(40), counts)
        assert own == pytest.approx(spearmanr(THEIRS[drawn], GOLD[drawn]).statistic)


def test_gains_spread_as_a_slow_bootstrap_says():
    found = intervals.gains(MINE, THEIRS, GOLD)
    assert found.shape == (intervals.RESAMPLES,)
    slow = []
    for _ in range(2000):
        drawn = RNG.integers(0, 40, 40)
        one, other = (spearmanr(each[drawn], GOLD[drawn]).statistic for each in (MINE, THEIRS))
        slow.append(one - other)
    several = [np.percentile(each, [2.5, 50, 97.5]) for each in (found, slow)]
    assert several[0] == pytest.approx(several[1], abs=0.03)


def test_the_same_seed_draws_the_same_and_a_model_is_not_above_itself():
    assert (intervals.gains(MINE, THEIRS, GOLD) == intervals.gains(MINE, THEIRS, GOLD)).all()
    assert not intervals.gains(MINE, MINE, GOLD).any()
