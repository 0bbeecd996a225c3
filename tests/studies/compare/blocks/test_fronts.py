"""Trajectories written out by hand: their points, and runs at equal similarity."""

import math

import pytest
from scipy.stats import t as student

from studies.compare import equal
from studies.compare.pages import renewed
from studies.compare.records import Records
from ubmoe.results.records import Record

MASKS = {
    "causal": {"attention": "causal"},
    "bidirectional": {},
    "sink kept": {"keep_sink": True},
}


def point(step, sts, lima, after=40.0, first=20.0):
    perplexity = {"lima": {"perplexity": lima}, "wikitext2_valid": {"perplexity": 20.0}}
    section = {"overall": {"after": after}, "first": first, "without_first": {"after": 50.0}}
    return {"step": step, "sts": {"average": sts}, "perplexity": perplexity} | {
        "distance": step / 1e4,
        "dependence": section,
    }


def run(row, seed, *points, train=("ffn",), lm_weight=0.0):
    bi = {"attention": "bidirectional", "layers": "all", "keep_sink": False, "form": "eol"}
    bi |= MASKS[row.split(",")[0]]
    stage = {"train": list(train), "lm_weight": lm_weight}
    config = {"model": {"name": "small"}, "seed": seed, "results": {"row": row}}
    config["bi"] = bi | {"stages": [stage]}
    data = {"config": config, "sts": {"tasks": {}, "trajectory": list(points)}}
    return Record(row.replace(" ", "-").replace(",", ""), "sts", seed, data)


def rows(block, *records):
    text = renewed(f"<!-- {block}: some -->\n<!-- end -->", Records(records), range(9))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[1:-1]]


def test_a_front_is_every_point_of_a_trajectory():
    points = [point(0, 70.0, 20.0), point(20, 74.0, 20.5), point(40, 75.0, 22.0)]
    actual = rows("front", run("causal", 0, *points))
    assert actual[0] == ["run", "step", "STSB-dev", "lima", "wikitext2_valid", "moved (%)"]
    assert actual[2:] == [
        ["causal", "0", "70.00", "1.000", "1.000", "0.00"],
        ["", "20", "74.00", "1.025", "1.000", "0.20"],
        ["", "40", "75.00", "1.100", "1.000", "0.40"],
    ]


def test_what_is_lost_is_read_where_the_similarity_is_first_reached():
    path = [(60.0, 0.0), (70.0, 0.1), (80.0, 0.5), (75.0, 0.9)]
    assert equal.lost_at(path, 65.0) == pytest.approx(0.05)
    assert equal.lost_at(path, 75.0) == pytest.approx(0.3)  # not where it comes down again
    assert equal.lost_at(path, 80.0) == 0.5 and equal.lost_at(path, 50.0) == 0.0
    assert math.isnan(equal.lost_at(path, 81.0))


def test_fronts_are_compared_at_the_highest_similarity_that_both_reach():
    one, other = [(60.0, 0.0), (80.0, 0.5)], [(70.0, 0.0), (78.0, 0.2), (74.0, 0.4)]
    assert equal.common_score(one, other) == equal.common_score(other, one) == 78.0
    assert equal.common_score(one, [(81.0, 0.0), (90.0, 0.1)]) is None  # it begins above


def kept_and_causal(gaps):
    """Pairs of seeds whose lost perplexity differs by `gaps` at a similarity of 80."""
    for seed, gap in enumerate(gaps):
        start = 16.0 + seed
        yield run("causal", seed, point(0, 70.0, start), point(20, 80.0, start * 1.02))
        lost = start * 1.04 * math.exp(2 * gap)  # at 90, twice as far as 80
        yield run("sink kept", seed, point(0, 70.0, start), point(20, 90.0, lost))


def test_masks_are_paired_by_seed_and_judged_by_students_t():
    gaps = [0.03, 0.05, 0.04, 0.01]
    [header, _, row] = rows("equal_fronts", *kept_and_causal(gaps))
    assert header == ["compared", "seeds", "STSB-dev", "lima", "wikitext2_valid", "by lima"]
    lost = [math.log(1.04) / 2 + gap - math.log(1.02) for gap in gaps]
    middle = sum(lost) / 4
    deviation = math.sqrt(sum((value - middle) ** 2 for value in lost) / 3)
    half = student.ppf(0.975, 3) * deviation / 2
    low, value, high = (math.exp(middle + part) for part in (-half, 0, half))
    assert row[:3] == ["sink kept, over causal", "4", "80.00"]
    assert row[3:] == [
        f"{value:.3f} ({low:.3f} to {high:.3f})",
        "1.000 (1.000 to 1.000)",
        "differs, equal",  # it is not nothing, and less than a tenth
    ]


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.00, 0.02, -0.02], "equal"),
        ([0.4, 0.42, 0.41], "differs"),
        ([0.4, -0.3, 0.2], "open"),
        ([0.4, 0.42], ""),  # two seeds have no interval to speak of
    ],
)
def test_a_verdict_needs_three_seeds(gaps, verdict):
    [row] = rows("equal_fronts", *kept_and_causal(gaps))[2:]
    assert row[-1] == verdict and ("to" in row[3]) is bool(verdict)


def test_modules_and_the_loss_are_compared_alike_and_what_has_no_common_similarity_is_not():
    points = point(0, 70.0, 10.0), point(20, 80.0, 11.0)
    low = point(0, 20.0, 10.0), point(20, 60.0, 11.0)
    noise = [point(0, 70.0, 10.0), point(0, 40.0, 12.0)]
    actual = rows(
        "equal_fronts",
        run("causal", 0, *points),
        run("bidirectional", 0, *low),
        run("causal, attention", 0, *points, train=["attention"]),
        run("causal, LM", 0, *points, lm_weight=1.0),
        run("causal, noise", 0, *noise),
        run("sink kept", 1, *points),  # no causal one of this seed
    )
    assert [row[0] for row in actual[2:]] == [
        "causal, attention, over causal",
        "causal, LM, over causal",
    ]


def test_what_moved_is_the_last_point_less_the_first():
    runs = [
        run("causal", seed, point(0, 70.0, 10.0), point(20, 80.0, 11.0, 41.0 + seed, 18.0))
        for seed in range(2)
    ]
    header, _, row = rows("moved", *runs)
    assert header == [
        *("tuned", "seeds", "DP-after", "first", "DP-after without the first key"),
        "weights moved (%)",
    ]
    assert row == ["causal", "2", "1.50", "-2.00", "0.00", "0.20"]
