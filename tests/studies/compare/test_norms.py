"""Lines of the picture are the records' own norms, of untouched models alone."""

import pytest

from studies.compare import norms
from studies.compare.records import Records
from ubmoe.results.records import Record


def measured(model, name, stages=(), shift=0.0):
    """A record whose first token has 1, 2, 4 ... under each mask, times a number a mask."""
    masks = {
        mask: {"first": [factor + shift, 2 * factor, 4 * factor], "others": [factor, 1.0, 1.0]}
        for factor, mask in enumerate(("causal", "bidirectional", "sink kept"), 1)
    }
    config = {"model": {"name": f"models/{model}.gguf"}, "bi": {"stages": list(stages)}}
    return Record(name, "dependence", 0, {"config": config, "dependence": {"norms": masks}})


@pytest.fixture
def records():
    tuned = measured("a", "a-tuned", stages=[{"objective": "simcse"}], shift=9.0)
    return Records([measured("b", "1"), measured("a", "2"), tuned])


def test_norms_are_of_untouched_models_alone(records):
    actual = norms.by_model(records)
    assert list(actual) == ["b", "a"]
    assert actual["a"]["causal"]["first"] == [1, 2, 4]


def test_a_panel_a_model_and_a_line_a_mask(records):
    panels = norms.figure(norms.by_model(records)).axes
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    for axes in panels:
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines["causal"].get_ydata()) == [1, 2, 4]
        assert list(lines["bidirectional"].get_ydata()) == [2, 4, 8]
        assert list(lines["sink kept"].get_ydata()) == [3, 6, 12]
        assert lines["sink kept"].get_linestyle() == "--"
        assert list(lines["other tokens, causal"].get_ydata()) == [1, 1, 1]
        assert axes.get_yscale() == "log"
