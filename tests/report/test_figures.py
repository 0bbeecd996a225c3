"""What a reader of a picture needs is in it, and seen."""

from matplotlib.colors import to_hex

from ubmoe.report import figures

BUCKET = {
    "range": [0, 64],
    "texts": 3,
    "main": 10.0,
    "before": 40.0,
    "after": 50.0,
    "first": 20.0,
    "uniform": {"after": 48.0},
    "without_first": {"after": 60.0},
}


def test_every_key_of_the_buckets_is_seen_on_white():
    heads = [{"heads": [{"after": 1.0}]}]
    drawn = figures.dependence({"buckets": [BUCKET], "layers": heads})["dependence_buckets.png"]
    [legend] = drawn.legends
    texts = [text.get_text() for text in legend.texts]
    assert "to the first token" in texts
    for patch in legend.get_patches():
        assert to_hex(patch.get_facecolor()) != "#ffffff" and patch.get_facecolor()[3] == 1


def test_panels_of_words_stand_two_a_line():
    """Four beside each other cannot be read at the width of a page."""
    rows = [
        {
            "feature": feature, "task": f"{feature}@1", "word": 1, "position": "same",
            "control": "none", "layer": -1, "probe": "ridge", "split": "lemma",
            "balanced_accuracy": 0.5, "balanced_accuracy_stderr": 0.1,
        }
        for feature in "abcd"
    ]  # fmt: skip
    drawn = figures.context([{"label": "Uni", "rows": rows}])
    places = [axes.get_subplotspec() for axes in drawn.axes]
    assert [(item.rowspan.start, item.colspan.start) for item in places] == [
        *((0, 0), (0, 1), (1, 0), (1, 1)),
    ]
    assert drawn.get_size_inches()[0] < 9
    three = figures.context([{"label": "Uni", "rows": rows[:3]}])
    assert len(three.axes) == 3
