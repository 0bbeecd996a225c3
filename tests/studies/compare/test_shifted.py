"""Runs whose sink was exchanged, in a table and in a figure."""

import numpy as np
import pytest
from builders import SEEDS

from studies.compare.pages import renewed
from studies.compare.records import Records
from studies.compare.shifted import shifted
from ubmoe.report.figures import SHIFTED, shift


def change(value, part=None):
    own = {"change": value, "interval": [value - 0.25, value + 0.5]}
    return own if part is None else own | {"of_whole": {"part": part, "interval": [0.0, 1.0]}}


def section(weights="new"):
    by_part = {"whole": change(2.0), "in": change(0.5, 0.25), "in elsewhere": change(0.25, 0.125)}
    by_part |= {"back": change(-1.0, 0.5), "back elsewhere": change(0.0, 0.0)}
    changes = {name: own | {"by_answer": own} for name, own in by_part.items()}
    changes["in"]["by_answer"] = change(0.0) | {"of_whole": None}
    places = ("model", "in", "encoder", "back")
    readings = {
        name: {"used": 30.0 - n, "first": 20.0 - n, "after": 40.0 + n}
        for n, name in enumerate(places)
    }
    exchanges = {"in": {"gap": 0.12, "by_row": 40.0}, "back": {"gap": 0.3, "by_row": 51.0}}
    actual = {"chats": 7, "readings": readings, "changes": changes, "exchanges": exchanges}
    return actual | {"bi_weights": weights}


def records(weights="new"):
    small, actual = {"model": {"name": "small"}}, {}
    bi = {"stages": [{"objective": "simcse", "train": ["ffn"]}], "attention": "bidirectional"}
    for seed in (0, 1):
        made = {"config": small | {"seed": seed, "bi": bi}, "environment": {"weights": "new"}}
        actual[f"a.sts.seed{seed}"] = made | {"sts": {"tasks": {}, "average": 1.0}}
        own = section(weights if seed else "new")
        actual[f"a.shift.seed{seed}"] = {"config": small | {"seed": seed}, "shift": own}
    return Records.of_names(actual)


def test_every_seed_is_shown_and_an_earlier_encoders_is_passed_over():
    assert list(shifted("small", records(), SEEDS)) == ["ffn, seed 0", "ffn, seed 1"]
    assert list(shifted("small", records(weights="old"), SEEDS)) == ["ffn, seed 0"]


def test_the_table_has_shares_changes_and_parts():
    table = renewed("<!-- shift: small -->\n<!-- end -->", records(), SEEDS).splitlines()
    rows = [[" ".join(cell.split()) for cell in line.strip("|").split("|")] for line in table[1:-1]]
    cells = {row[0]: row[1:] for row in rows}
    assert cells[""] == ["ffn, seed 0", "ffn, seed 1"]
    assert cells["first: model, encoder, in, back"][0] == "20.0, 18.0, 19.0, 17.0"
    assert cells["the encoder over the model"][0] == "+2.00 (+1.75 to +2.50)"
    saved = "back: the encoder with the model's shares, over the encoder"
    assert cells[saved][0] == "-1.00 (-1.25 to -0.50); 50% (0% to 100%)"
    once = "in: the model with the encoder's shares, over the model, each answer once"
    assert cells[once][0] == "+0.00 (-0.25 to +0.50)"
    assert cells["left row by row, in and back"][0] == "40 %, 51 %"


def test_the_picture_has_what_is_lost_and_what_is_saved():
    names = [name for name in SHIFTED if name in section()["changes"]]
    one, other = shift(shifted("small", records(), SEEDS)).axes
    assert len(one.containers) == len(names) == 5  # of a record without the later controls
    saved = one.containers[names.index("back")]
    assert list(saved.lines[0].get_xdata()) == [1.0, 1.0]  # what is saved is above 0
    [reach] = saved.lines[2]
    assert [list(item[:, 0]) for item in reach.get_segments()] == [pytest.approx([0.5, 1.25])] * 2
    per_answer = other.containers[names.index("in")]
    assert np.allclose(per_answer.lines[0].get_xdata(), 0.0)
    whole = section()
    whole["changes"] |= {name: whole["changes"]["in"] for name in SHIFTED if name not in names}
    assert len(shift({"a": whole}).axes[0].containers) == 8
    assert len(shift({"a": whole, "b": section()}).axes[0].containers) == 5
