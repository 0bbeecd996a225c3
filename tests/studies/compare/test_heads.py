"""Changes of single heads, by hand; and where they are shown."""

import pytest
from builders import MODEL, SEEDS, causal, measured, shares

from studies.compare import claim, runs
from studies.compare.heads import HEADS, MOVED, TOWARDS_LATER, head_changes
from studies.compare.pages import renewed
from studies.compare.records import Records

LOSSES = [1.0, 2.0, 3.0, 4.0]


def with_heads(records, *heads):
    """The same, two layers of two heads each, given as (DP-after, that without the first key)."""
    [section] = [record["dependence"] for record in records.values() if "dependence" in record]
    rows = [{"after": after, "without_first": {"after": without}} for after, without in heads]
    section["layers"] = [{"heads": rows[:2]}, {"heads": rows[2:]}]
    return records


def study():
    """The base, and two pairs whose four heads turn by what stands in `tuned`."""
    actual = measured("base", 0, [], shares(), LOSSES)
    with_heads(actual, (10.0, 20.0), (30.0, 40.0), (50.0, 60.0), (70.0, 80.0))
    for seed in range(3):
        tuned = measured("a", seed, ["ffn"], shares(1.0), LOSSES)
        # up 4 and down 6, up 2, not at all: 3 points either way; without the first key up 8, down 8
        actual |= with_heads(tuned, (14.0, 28.0), (24.0, 32.0), (52.0, 60.0), (70.0, 80.0))
        control = causal(measured("b", seed, ["ffn"], shares(1.0), LOSSES), 40.0)
        actual |= with_heads(control, (10.0, 21.0), (30.0, 40.0), (50.0, 60.0), (70.0, 80.0 - seed))
    return actual


def dependence(records, name):
    return Records.of_names(records).of("dependence", label=name)[0]


def test_heads_that_move_in_opposite_directions_do_not_hide_in_their_mean():
    records = study()
    actual = head_changes(dependence(records, "a"), dependence(records, "base"))
    assert actual == {TOWARDS_LATER: pytest.approx(8 / 4), MOVED: pytest.approx(12 / 4)}


def test_heads_of_other_texts_or_of_an_older_record_tell_nothing():
    def changes(change):
        records = study()
        change(records["a.dependence.seed0"])
        return head_changes(dependence(records, "a"), dependence(records, "base"))

    assert changes(lambda record: None) != {}
    assert changes(lambda record: record.update(inputs={"dependence.dataset": "other"})) == {}
    assert changes(lambda record: record["dependence"].pop("layers")) == {}
    head = "layers", 0, "heads", 0
    assert changes(lambda record: reached(record["dependence"], *head).pop("without_first")) == {}
    assert head_changes(None, dependence(study(), "base")) == {}
    records = study()
    for name in ("a", "base"):  # of texts that neither says
        records[f"{name}.dependence.seed0"]["dependence"].pop("by_text")
    assert head_changes(dependence(records, "a"), dependence(records, "base")) == {}


def reached(tree, *path):
    for item in path:
        tree = tree[item]
    return tree


def test_they_are_shown_over_runs_over_pairs_and_beside_lost_generation():
    records = Records.of_names(study())
    [pairs] = runs.pairs(MODEL, records, SEEDS).values()
    assert [(pair.cells[TOWARDS_LATER], pair.cells[MOVED]) for pair in pairs] == [
        (2 - 1 / 4, 3.0)
    ] * 3
    changes = runs.changes(MODEL, records, SEEDS)
    changed = {
        kind: [(item.cells[TOWARDS_LATER], item.cells[MOVED]) for item in own]
        for kind, own in changes.items()
    }
    assert changed == {"ffn": [(2.0, 3.0)] * 3, "ffn causal": [(1 / 4, 0.0)] * 3}
    own = [item for item in claim.tuned(MODEL, records, SEEDS) if not item.is_control]
    assert [(item.causes[TOWARDS_LATER], item.causes[MOVED]) for item in own] == [(2.0, 3.0)] * 3
    for block, cell in (("masks", "1.75 (1.75 to 1.75)"), ("runs", "2.00 (2.00 to 2.00)")):
        page = renewed(f"<!-- {block}: {MODEL} -->\n<!-- end -->", records, SEEDS)
        assert cell in page and HEADS[TOWARDS_LATER] in page
        assert (f"{HEADS[TOWARDS_LATER]}, minus its" in page) == (block == "masks")


def test_a_pair_of_which_one_has_no_heads_has_the_other_columns():
    records = study()
    for seed in range(3):
        records[f"b.dependence.seed{seed}"]["dependence"].pop("layers")
    [pairs] = runs.pairs(MODEL, Records.of_names(records), SEEDS).values()
    assert {"DP-after"} <= pairs[0].cells.keys() and not HEADS.keys() & pairs[0].cells.keys()
