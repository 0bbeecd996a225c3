"""Pairs to train on: every negative is read, and what is said to be no positive is none."""

import json

import pytest

from ubmoe.config import UserError
from ubmoe.data.bad_rows import dropping
from ubmoe.data.pairs import Pairs, read_pairs


class Plain:
    """A tokenizer without tokens that its model lacks."""

    embedding_rows = None


def read(tmp_path, rows, *arguments) -> Pairs:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_pairs(str(path), Plain(), None, *arguments)


def pair(number, **fields):
    return {"anchor": f"a{number}", "positive": f"p{number}"} | fields


@pytest.mark.parametrize(
    ("name", "values", "kept", "threshold"),
    [
        ("label", [0, 1, 0, 1], [1, 3], 1),
        ("labels", [[0], [1], [0], [1]], [1, 3], 1),
        ("label", [False, True, False, True], [1, 3], 1),
        ("score", [2.5, 4.0, "3.9", "4"], [1, 3], 4),
        ("similarity_score", [0.1, 0.8, 0.79, 1.0], [1, 3], 0.8),
        ("relatedness_score", [-1, 0, 0.5, 1], [1, 2, 3], 0),
        ("gold_label", ["neutral", "entailment", "contradiction", "Entailment"], [1, 3], 1),
        ("is_duplicate", ["0", "1", "no", "yes"], [1, 3], 0.5),
        ("Label", [0, 1, 0, 1], [1, 3], 1),
        ("label_id", [0, 1, 0, 1], [1, 3], 1),
        ("similar", [False, True, False, True], [1, 3], 1),
        ("relevant", [0, 1, 0, 1], [1, 3], 1),
        ("equivalent", ["no", "yes", "no", "yes"], [1, 3], 1),
        ("cos_sim", [0.1, 0.9, 0.2, 0.8], [1, 3], 0.5),
        ("match", [0, 1, 0, 1], [1, 3], 1),
    ],
)
def test_rows_below_the_threshold_are_left_out_and_counted(tmp_path, name, values, kept, threshold):
    rows = [pair(number, **{name: value}) for number, value in enumerate(values)]
    actual = read(tmp_path, rows, threshold)
    assert actual.columns["anchor"] == [f"a{number}" for number in kept]
    assert actual.columns["positive"] == [f"p{number}" for number in kept]
    assert actual.below == len(rows) - len(kept)
    with pytest.raises(UserError, match=f":1: has a column {name}, .*positive_from"):
        read(tmp_path, rows)


@pytest.mark.parametrize(
    ("fields", "threshold", "expected"),
    [
        ({}, 1, "has no label or score to hold against"),
        ({"label": None}, 1, "has no label or score"),
        ({"gold_label": "-"}, 1, "got the gold_label '-'; expected a number"),
        ({"label": {}}, 1, "label is {}; expected a number or a word"),
        ({"score": float("nan")}, 1, "got the score 'nan'"),
        ({"label": 1, "score": 2}, 1, "has label and score; expected one label or score"),
        ({"label": 0}, 1, "all of its 1 rows are below"),
    ],
)
def test_what_cannot_be_held_against_it_is_refused(tmp_path, fields, threshold, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, [pair(1, **fields)], threshold)
    assert expected in str(caught.value)


def test_what_is_no_label_of_a_pair_is_left_alone(tmp_path):
    teacher = {"pos_scores": [0.9], "neg_scores": [0.1], "id": 7, "label_text": "x", "label": None}
    assert read(tmp_path, [pair(1, **teacher)]).below == 0


@pytest.mark.parametrize(
    "name",
    [
        "negative_text",
        "hard_negative_passage",
        "neg_docs",
        "positive_2",
        "pos1",
        "sent2",
        "query_1",
    ],
)
def test_texts_in_columns_that_are_not_read_are_refused_by_name(tmp_path, name):
    with pytest.raises(
        UserError, match=f":1: has a column {name}, which is not read; expected neg"
    ):
        read(tmp_path, [pair(1, **{name: "x"})])


def test_what_is_known_of_single_texts_is_left_alone(tmp_path):
    known = {"negative_id": "d7", "neg_scores": [0.1], "hard_negative_title": "x", "negation": True}
    assert list(read(tmp_path, [pair(1, **known)]).columns) == ["anchor", "positive"]


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_1": "x", "negative_2": "y", "negative_3": "z"},
        {"neg_3": "z", "neg_1": "x", "neg_2": "y"},
        {"negative1": "x", "negative2": "y", "negative3": "z"},
        {"hard_negative_0": "x", "hard_negative_1": "y", "hard_negative_2": "z"},
        {"hard_neg": "x", "hard_neg_1": "y", "hard_neg_2": "z"},
        {"negative": "x", "negative_2": "y", "negative_3": "z"},
        {"neg": ["x", "y", "z"]},
        {"negatives": ["x", "y", "z"]},
        {"negative_1": ["x", "y"], "negative_2": "z"},
        {**{f"negative_{n}": None for n in range(4, 9)}, "hard_negatives": ["x", "y", "z"]},
    ],
)
def test_all_negatives_are_read_in_their_order(tmp_path, fields):
    columns = read(tmp_path, [pair(1, **fields)] * 2).columns
    assert list(columns) == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    assert [columns[f"negative_{n}"] for n in (1, 2, 3)] == [["x"] * 2, ["y"] * 2, ["z"] * 2]


def test_ten_negatives_are_in_the_order_of_their_numbers(tmp_path):
    columns = read(tmp_path, [pair(1, **{f"neg_{n}": f"n{n}" for n in range(1, 12)})]).columns
    assert [columns[f"negative_{n}"][0] for n in range(1, 12)] == [f"n{n}" for n in range(1, 12)]


BOTH = {"negative_1": "x", "negative_2": "y"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([BOTH, {"negative_1": "x"}], ":2: has 1 negative, and "),
        ([{"negative_1": "x"}, BOTH], ":2: has 2 negatives, and "),
        ([{}, BOTH], ":1: has no negative, and "),
        ([BOTH, BOTH | {"negative_1": None}], ":2: has negative_2; expected one column"),
        ([{"negative_1": "x", "negative_3": "y"}], ":1: has negative_1, negative_3; expected"),
        ([{"neg": "x", "negative": "y"}], ":1: has neg, negative; expected one column"),
        ([{"neg_1": "x", "negative_1": "y"}], ":1: has neg_1, negative_1; expected"),
        ([{"neg": ["x", " "]}], ":1: empty neg; remove the row"),
        ([{"neg": ["x", 3]}], ":1: neg is 3; expected a text"),
    ],
)
def test_a_gap_or_another_number_of_negatives_is_refused_by_row(tmp_path, rows, expected):
    rows = [pair(number, **fields) for number, fields in enumerate(rows)]
    with pytest.raises(UserError) as caught:
        read(tmp_path, rows)
    assert expected in str(caught.value)


def test_rows_with_a_gap_can_be_dropped_wherever_they_stand(tmp_path):
    gap = {"negative_1": "x", "negative_3": "y"}
    with dropping(True) as dropped:
        actual = read(tmp_path, [pair(1, **gap), pair(2, **BOTH), pair(3, **gap)])
    assert actual.columns["anchor"] == ["a2"] and len(dropped) == 2
