"""Changes by hand, and parts of a whole."""

import pytest

from ubmoe.interventions.changes import changes

LOST = {
    "model": [2.0, 4.0],
    "encoder": [6.0, 8.0],
    "in": [3.0, 4.0],
    "in elsewhere": [2.0, 5.0],
    "in scaled": [2.0, 7.0],
    "back": [4.0, 8.0],
    "back elsewhere": [7.0, 8.0],
    "back scaled": [4.0, 6.0],
    "temperature": [5.0, 8.0],
}


def changes_of(lost):
    tokens = [1, 3]
    return changes({name: {"answers": {"losses": x, "tokens": tokens}} for name, x in lost.items()})


def test_they_are_in_nats_a_token_and_parts_of_the_whole():
    actual = changes_of(LOST)
    moved = {"whole": 8, "in": 1, "in elsewhere": 1, "in scaled": 3, "back": -2}
    moved |= {"back elsewhere": 1, "back scaled": -4, "temperature": -1}
    moved |= {"back over scaled": 2, "back over temperature": -1}  # of 4 tokens together
    assert {name: item["change"] for name, item in actual.items()} == {
        name: nats / 4 for name, nats in moved.items()
    }
    for name, nats in moved.items():  # what is put in loses, all else saves
        part = (nats if name.startswith("in") else -nats) / 8
        assert name == "whole" or actual[name]["of_whole"]["part"] == part
    answers = [actual[name]["by_answer"]["change"] for name in list(moved)[:6]]
    assert answers == pytest.approx([(4 + 4 / 3) / 2, 1 / 2, 1 / 6, 1 / 2, -1, 1 / 2])
    assert actual["in"]["interval"] == [0.0, 1.0]  # draws of one chat alone, and of the other
    assert actual["in"]["of_whole"]["interval"] == [0.0, 0.25]


def test_there_is_no_part_of_what_is_not_surely_lost():
    actual = changes_of(LOST | {"encoder": [1.0, 8.0]})
    assert actual["whole"]["interval"][0] < 0 and actual["in"]["of_whole"] is None
