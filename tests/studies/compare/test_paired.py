"""Differences to the base, of the same texts alone."""

import math

import numpy as np
import pytest
from builders import MODEL, SEEDS, TOKENS, causal, encoder, measured, scores, shares

from studies.compare import claim, paired, tradeoff
from studies.compare.records import Records
from studies.compare.rows import SINK

RNG = np.random.default_rng(0)


BASE = measured("c", 0, [], shares(), [1.0, 2.0, 3.0, 4.0])


def found(*more):
    every = dict(BASE)
    for each in more:
        every |= each
    return paired.changes(MODEL, Records.of_names(every), SEEDS)


def test_what_all_texts_share_is_certain_however_far_apart_they_are():
    rows = found(measured("a", 0, ["ffn"], shares(2.5), [1.5, 2.5, 3.5, 4.5]))
    assert list(rows) == ["ffn"]
    for column in SINK:
        moved = rows["ffn"][column]
        assert (moved.value, moved.interval, moved.seeds) == (2.5, (2.5, 2.5), (2.5,))
        assert str(rows["ffn"][column]) == "2.50 (2.50 to 2.50)"
    assert rows["ffn"]["perplexity"].value == pytest.approx(math.exp(2.0 / 10))
    per_answer = 0.5 * (1 / 2 + 1 / 3 + 1 / 4 + 1) / 4  # of 2, 3, 4 and 1 tokens
    assert rows["ffn"]["per answer"].value == pytest.approx(math.exp(per_answer))


def test_further_chats_have_a_column_of_their_own():
    def shares_of(name, train, losses):
        every = measured(name, 0, train, shares(), [1.0, 2.0, 3.0, 4.0])
        further = {"essays": {"answers": {"losses": losses, "tokens": [4, 6]}}}
        every[f"{name}.evaluation.seed0"]["generation"]["further"] = further
        return every

    [row] = paired.changes(
        MODEL,
        Records.of_names(shares_of("c", [], [4.0, 6.0]) | shares_of("a", ["ffn"], [8.0, 7.0])),
        SEEDS,
    ).values()
    assert row["perplexity of essays"].value == pytest.approx(math.exp((4 + 1) / 10))
    assert row["perplexity"].value == 1
    both = shares_of("c", [], [4.0, 6.0]) | shares_of("a", ["ffn"], [8.0, 7.0])
    both |= measured(
        "b", 1, ["ffn"], shares(), [1.0, 2.0, 3.0, 9.0]
    )  # a seed without losses by text
    [row] = paired.changes(MODEL, Records.of_names(both), SEEDS).values()
    assert row["perplexity of essays"].value == pytest.approx(math.exp((4 + 1) / 10))
    assert row["perplexity"].value == pytest.approx(math.exp(2.5 / 10))
    [alone] = found(
        shares_of("a", ["ffn"], [8.0, 7.0])
    ).values()  # the base's have no losses by text
    assert alone["perplexity of essays"] is None


def test_what_the_sink_moves_is_the_change_of_its_factor():
    """Of one row a text, so that DP-after is the product: (1 - first) x without."""
    first, without = np.array([20.0, 30.0, 10.0, 40.0]), np.array([50.0, 60.0, 55.0, 70.0])

    def shares_of(first, without):
        after = (100 - first) * without / 100
        columns = {"after": after, "first": first, "without_first.after": without}
        return {"tokens": TOKENS} | {name: list(column) for name, column in columns.items()}

    every = measured("c", 0, [], shares_of(first, without), [1.0, 2.0, 3.0, 4.0])
    every |= measured("a", 0, ["ffn"], shares_of(first - 8, without), [1.0, 2.0, 3.0, 4.0])
    every |= measured("b", 0, ["attention"], shares_of(first, without + 3), [1.0, 2.0, 3.0, 4.0])
    rows = paired.changes(MODEL, Records.of_names(every), SEEDS)
    by_sink = rows["ffn"][paired.BY_SINK].value
    assert by_sink == pytest.approx(8 * without.mean() / 100) == rows["ffn"]["DP-after"].value
    assert rows["attention"][paired.BY_SINK].value == 0 < rows["attention"]["DP-after"].value
    every |= measured("d", 0, ["all"], shares_of(first - 8, without + 3), [1.0, 2.0, 3.0, 4.0])
    both = paired.changes(MODEL, Records.of_names(every), SEEDS)["all"]
    other = (3 * (100 - first + 4) / 100).mean()  # the other factor, at the middle of the first
    assert both[paired.BY_SINK].value + other == pytest.approx(both["DP-after"].value)


def test_the_interval_is_that_of_the_mean_over_seeds():
    one, other = ([1.0, 2.5, 3.25, 6.0], [1.5, 2.0, 4.0, 4.5])
    rows = found(
        measured("a", 0, ["ffn"], shares(2.0), one), measured("a", 1, ["ffn"], shares(3.0), other)
    )
    assert rows["ffn"]["DP-after"].value == 2.5
    assert str(rows["ffn"]["DP-after"]) == "2.50 (2.50 to 2.50; seeds 2.00 to 3.00)"
    each = [math.exp((sum(losses) - 10) / 10) for losses in (one, other)]
    assert rows["ffn"]["perplexity"].seeds == pytest.approx(each)
    lost = (np.array(one) + np.array(other)) / 2 - [1, 2, 3, 4]
    tokens, slow = np.array([2, 3, 4, 1]), []
    assert rows["ffn"]["perplexity"].value == pytest.approx(math.exp(lost.sum() / 10))
    for _ in range(20_000):
        drawn = RNG.integers(0, 4, 4)
        slow.append(math.exp(lost[drawn].sum() / tokens[drawn].sum()))
    expected = np.percentile(slow, [2.5, 97.5])
    assert rows["ffn"]["perplexity"].interval == pytest.approx(expected, rel=0.03)


def test_a_row_is_held_against_its_causal_control_seed_by_seed():
    one, two = [1.5, 2.5, 3.5, 4.5], [1.0, 2.0, 3.0, 8.0]
    every = measured("a", 0, ["ffn"], shares(5.0), one)
    every |= measured("a", 1, ["ffn"], shares(4.0), two)
    every |= measured("a", 2, ["ffn"], shares(90.0), two)  # no control
    every |= causal(measured("z", 0, ["ffn"], shares(2.0), [1.5, 2.5, 3.5, 3.5]), 45.0)
    every |= causal(measured("b", 1, ["ffn"], shares(3.0), [1.0, 2.0, 3.0, 6.0]), 47.0)
    every |= causal(measured("d", 0, ["attention"], shares(), one), 45.0)
    [(row, pair)] = paired.against_controls(MODEL, Records.of_names(every), [0, 1, 2]).items()
    assert row == "ffn"
    assert [[each.seed for each in own] for own in (pair.both, pair.causal)] == [[0, 1]] * 2
    moved = pair.cells["DP-after"]
    assert (moved.value, moved.interval, moved.seeds) == (2.0, (2.0, 2.0), (3.0, 1.0))
    assert pair.cells["perplexity"].value == pytest.approx(math.exp((1 + 2) / 2 / 10))
    assert pair.cells["perplexity"].seeds == pytest.approx([math.exp(0.1), math.exp(0.2)])


def rows_of(*more):
    every = dict(BASE)
    for each in more:
        every |= each
    return {match.row: match for match in paired.matches(MODEL, Records.of_names(every), SEEDS)}


def test_a_run_that_has_collapsed_is_a_row_apart_and_held_against_the_base_alone():
    def tuned(name, seed, closer, attention="bidirectional"):
        every = measured(name, seed, ["ffn"], shares(2.0), [2.0, 3.0, 4.0, 5.0])
        sts = every[f"{name}.sts.seed{seed}"]
        sts["config"]["bi"]["attention"] = attention
        cosines = {"positive_cosine": 0.9 + closer, "negative_cosine": 0.9}
        sts["sts"]["stages"] = [{"log": [{"loss": 1.0, **cosines}, {"train_runtime": 9.0}]}]
        return every

    every = BASE | tuned("a", 0, 0.1) | tuned("b", 1, 0.001) | tuned("d", 1, 0.1, "causal")
    records = Records.of_names(every)
    rows = paired.changes(MODEL, records, SEEDS)
    assert list(rows) == ["ffn", "ffn, collapsed", "ffn causal"]
    assert paired.against_controls(MODEL, records, SEEDS) == {}  # its own seed has none
    assert {match.row for match in paired.matches(MODEL, records, SEEDS)} == {"ffn", "ffn causal"}
    assert {each.row for each in claim.tuned(MODEL, records, SEEDS)} == {"ffn", "ffn causal"}
    assert set(tradeoff.points(MODEL, records, SEEDS)) == {"base", "ffn", "ffn causal"}


def test_a_row_is_held_against_the_least_loss_that_embeds_as_well():
    both = measured("a", 0, ["ffn"], shares(), [1.5, 2.5, 3.5, 4.5])  # its STS is 51
    worse = causal(measured("b", 0, ["ffn"], shares(), [3.0, 3.5, 4.0, 5.0]), 45.0)
    rows = rows_of(both, worse, measured("d", 0, ["attention"], shares(), [1.0, 2.0, 3.0, 4.0]))
    assert set(rows) == {"ffn", "ffn causal"}  # attention has no control
    assert rows["ffn"] == paired.Match("ffn", 51.0)  # nothing of the other mask embeds as well
    found = rows["ffn causal"]
    assert (found.sts, found.other, found.other_sts) == (45.0, "ffn", 51.0)
    lost = np.array([3.0, 3.5, 4.0, 5.0]) - [1.5, 2.5, 3.5, 4.5]
    assert found.ratio.value == pytest.approx(math.exp(lost.sum() / 10))
    assert 1 < found.ratio.interval[0] < found.ratio.value < found.ratio.interval[1]


def test_of_several_that_embed_as_well_the_nearest_is_taken_whatever_it_loses():
    several = {"a": (52.0, [1.5, 2.5, 3.5, 4.5]), "e": (60.0, [1.2, 2.0, 3.0, 4.0])}
    several["f"] = (44.0, [1.0, 1.0, 1.0, 1.0])  # loses least, and embeds worse
    every = causal(measured("b", 0, ["ffn"], shares(), [3.0, 3.5, 4.0, 5.0]), 45.0)
    for name, (sts, losses) in several.items():
        own = measured(name, 0, ["ffn"], shares(), losses)
        made = own[f"{name}.sts.seed0"]
        made["sts"] |= {"tasks": dict.fromkeys(made["sts"]["tasks"], sts)}
        made["config"]["results"] = {"row": f"ffn {name}"}
        every |= own
    assert rows_of(every)["ffn causal"].other == "ffn a"


def test_rows_that_share_no_task_are_not_held_against_each_other():
    both = measured("a", 0, ["ffn"], shares(), [1.5, 2.5, 3.5, 4.5])
    other = causal(measured("b", 0, ["ffn"], shares(), [3.0, 3.5, 4.0, 5.0]), 45.0)
    other["b.sts.seed0"]["sts"]["tasks"] = {"another": 45.0}
    assert rows_of(both, other) == {}


def answered(name, seed, train, **values):
    """An encoder, or the base, whose tasks were asked; values: of each question."""
    model = "bi" if train else f"Qwen/{MODEL}"
    generation = scores(40.0, 2.0) | {"metrics": {"mmlu": "acc"}}
    generation |= {"questions": values, "stderr": dict.fromkeys(values, 1.0)}
    config = {"model": {"name": model}, "seed": seed}
    evaluated = {"config": config, "generation": generation}
    return encoder(name, seed, 50.0, train) | {f"{name}.evaluation.seed{seed}": evaluated}


def gained(*more):
    every = {}
    for each in more:
        every |= each
    against, gains = paired.questions("causal_lm", MODEL, Records.of_names(every), SEEDS)
    assert against == "base"
    return gains


def test_questions_are_compared_one_by_one():
    base = answered("c", 0, [], mmlu=[1.0, 0.0, 0.0, 1.0], other=[1.0, 1.0])
    one = answered("a", 0, ["ffn"], mmlu=[1.0, 1.0, 0.0, 1.0])
    two = answered("a", 1, ["ffn"], mmlu=[1.0, 1.0, 1.0, 1.0])
    [(row, cells)] = gained(base, one, two).items()
    assert row.startswith("ffn") and cells["other"] is None  # nobody answered it
    assert cells["mmlu"].value == pytest.approx(100 * (1 + 0.5) / 4)
    assert cells["mmlu"].seeds == pytest.approx([25.0, 50.0])
    moved = np.array([0, 100, 50, 0])
    slow = [moved[RNG.integers(0, 4, 4)].mean() for _ in range(20_000)]
    assert cells["mmlu"].interval == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=3)


def test_tasks_of_another_length_or_of_older_records_are_not_compared():
    base = answered("c", 0, [], mmlu=[1.0, 0.0])
    assert gained(base, answered("a", 0, ["ffn"], mmlu=[1.0, 0.0, 0.0])) == {}
    prompted = answered("a", 0, ["ffn"], mmlu=[1.0, 0.0])
    prompted["a.evaluation.seed0"]["generation"]["shots"] = {"mmlu": 5}
    assert gained(base, prompted) == {}
    older = answered("a", 0, ["ffn"])
    del older["a.evaluation.seed0"]["generation"]["questions"]
    assert gained(base, older) == {}


def test_other_texts_older_records_and_seeds_not_measured_are_not_compared():
    of_others = shares(1.0) | {"tokens": [5, 9, 12, 31]}
    rows = found(measured("a", 0, ["ffn"], of_others, [1.5, 2.5, 3.5, 4.5]))
    assert rows["ffn"]["DP-after"] is None and rows["ffn"]["perplexity"] is not None
    digests = measured("a", 0, ["ffn"], shares(1.0), [1.5, 2.5, 3.5, 4.5])
    digests["a.evaluation.seed0"]["inputs"] = {"ubmoe.dataset": "other"}
    assert found(digests)["ffn"]["perplexity"] is None  # though as many tokens
    rounded = measured("a", 0, ["ffn"], shares(1.0), [1.5, 2.5, 3.5, 4.5])
    rounded["a.evaluation.seed0"]["config"]["evaluation"] = {"bf16": True}
    assert found(rounded)["ffn"]["perplexity"] is None  # in another precision
    older = measured("a", 0, ["ffn"], shares(1.0), [1.5, 2.5, 3.5, 4.5])
    del older["a.dependence.seed0"]["dependence"]["by_text"]
    del older["a.evaluation.seed0"]["generation"]["answers"]
    assert found(older) == {}
    half = measured("a", 0, ["ffn"], shares(1.0), [1.5, 2.5, 3.5, 4.5])
    assert found(half, encoder("a", 1, 50.0, ["ffn"])) == {}
