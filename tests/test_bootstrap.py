"""Ranks from counts, against ranks of the drawn pairs themselves."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from ubmoe import bootstrap

RNG = np.random.default_rng(0)
GOLD = RNG.integers(0, 6, 40) / 2  # with ties, as STS scores have them
MINE, THEIRS = GOLD + RNG.normal(size=40), np.round(GOLD + 2 * RNG.normal(size=40), 1)
COUNTS = RNG.multinomial(40, np.full(40, 1 / 40), 5)


@pytest.mark.parametrize("values", [GOLD, MINE, THEIRS])
def test_ranks_are_those_of_the_drawn_pairs(values):
    actual = bootstrap.ranks(COUNTS, values)
    for counts, own in zip(COUNTS, actual, strict=True):
        drawn = np.repeat(np.arange(40), counts)
        assert own[drawn].tolist() == rankdata(values[drawn]).tolist()


def test_correlations_are_those_of_the_drawn_pairs():
    actual = bootstrap.spearman(COUNTS, THEIRS, GOLD)
    for counts, own in zip(COUNTS, actual, strict=True):
        drawn = np.repeat(np.arange(40), counts)
        assert own == pytest.approx(spearmanr(THEIRS[drawn], GOLD[drawn]).statistic)


def test_families_are_drawn_whole(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 6)
    families = [str(number % 7) for number in range(40)]
    actual = bootstrap.correlations(THEIRS, GOLD, families=families)
    places = np.arange(40)
    for counts, own in zip(np.concatenate(list(bootstrap.draws(7))), actual, strict=True):
        drawn = np.concatenate(
            [np.tile(places[places % 7 == item], counts[item]) for item in range(7)]
        )
        assert own == pytest.approx(spearmanr(THEIRS[drawn], GOLD[drawn]).statistic)


def test_gains_spread_as_a_slow_bootstrap_says():
    actual = bootstrap.correlations(MINE, GOLD) - bootstrap.correlations(THEIRS, GOLD)
    assert actual.shape == (bootstrap.RESAMPLES,)
    slow = []
    for _ in range(2000):
        drawn = RNG.integers(0, 40, 40)
        one, other = (spearmanr(item[drawn], GOLD[drawn]).statistic for item in (MINE, THEIRS))
        slow.append(one - other)
    several = [np.percentile(item, [2.5, 50, 97.5]) for item in (actual, slow)]
    assert several[0] == pytest.approx(several[1], abs=0.03)


def test_the_same_seed_draws_the_same():
    one, other = (bootstrap.correlations(MINE, GOLD) for _ in range(2))
    assert (one == other).all()


@pytest.mark.parametrize("at_once", [1, 90, 10**6])
def test_draws_do_not_depend_on_how_many_stand_in_memory(monkeypatch, at_once):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 7)
    expected = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 7)
    monkeypatch.setattr(bootstrap, "AT_ONCE", at_once)
    assert (np.concatenate(list(bootstrap.draws(40))) == expected).all()
    assert (np.concatenate(list(bootstrap.draws(40, 3))) == expected[:3]).all()


def test_draws_are_kept_where_they_are_few_and_cannot_be_changed(monkeypatch):
    first, again = (next(bootstrap.draws(40, 9)) for _ in range(2))
    assert first is again and not first.flags.writeable
    monkeypatch.setattr(bootstrap, "KEPT", 40 * 9 - 1)
    assert (
        next(bootstrap.draws(40, 9)) is not first and (next(bootstrap.draws(40, 9)) == first).all()
    )


def test_means_are_those_of_the_drawn_items(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 5)
    weights = RNG.integers(1, 9, 40)
    actual = bootstrap.means(np.stack([MINE, THEIRS]), weights)
    alone = bootstrap.means(MINE)
    for counts, both, one in zip(*(next(bootstrap.draws(40)), actual, alone), strict=True):
        drawn = np.repeat(np.arange(40), counts)
        sums = [item[drawn].sum() / weights[drawn].sum() for item in (MINE, THEIRS)]
        assert both == pytest.approx(sums)
        assert one == pytest.approx(MINE[drawn].mean())


def test_an_interval_holds_the_middle_95_percent_and_passes_over_nan():
    values = np.append(np.arange(1, 1002), np.nan)
    assert bootstrap.interval(values) == [26.0, 976.0]
