"""The picture of what word vectors know, of the models of a study."""

import pytest
from builders import MODEL, ROWS, SEEDS, encoder, study

from ubmoe.config import load_config
from ubmoe.report.figures import MODELS
from ubmoe.results import tradeoff, words
from ubmoe.results.records import Records

CHANCE, KNOWN = [0.5, 0.5, 0.5, 0.5, 0.9], [0.7, 0.7, 0.8, 0.8, 0.95]  # at the five words


def probed(name, label, values):
    """A run's probing, of the context task by ridges; the split with shared words is no line."""
    rows = [
        {"task": f"object_animacy@{word}", "split": split, "control": "none"}
        | {"position": "same", "layer": -1, "probe": "ridge"}
        | {"balanced_accuracy": value - shift, "balanced_accuracy_stderr": 0.02}
        for word, value in enumerate(values, 1)
        for split, shift in (("shipped", 0.0), ("random", 0.3))
    ]
    config = {"model": {"name": f"Qwen/{MODEL}" if label == "Uni" else "bi"}, "seed": 0}
    config["probing"] = {"data": "folder", "models": [{"label": label}], "probes": ["ridge"]}
    section = {"models": [{"label": label, "rows": rows}]}
    return {f"{name}.probing.seed0": {"config": config, "probing": section}}


@pytest.fixture
def records():
    return Records.of_names(
        {
            **encoder("b", 0, 50.0, ["ffn"]),
            **probed("b", "ffn", KNOWN),
            **encoder("a", 0, 50.0, []),
            **probed("a", "Uni", CHANCE),
        }
    )


def test_a_line_a_model_says_what_each_word_tells(records):
    models = words.of_context(words.probed(MODEL, records, SEEDS))
    [panel] = words.figure(MODEL, models).axes
    lines = [line for line in panel.get_lines() if len(line.get_xdata()) == 5]
    assert [each.get_color() for each in lines] == [*MODELS[:2]]  # the base's first, in black
    assert [list(each.get_ydata()) for each in lines] == [CHANCE, KNOWN]
    assert {tuple(each.get_xdata()) for each in lines} == {(1, 2, 3, 4, 5)}


def test_it_is_among_the_pictures_of_a_study_that_probed_two_models(records, tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    every = study(ROWS)
    assert "words.png" not in tradeoff.draw(load_config(None, keys), Records.of_names(every))
    for name, label, values in (("r0", "Uni", CHANCE), ("r1", "ffn", KNOWN)):
        every |= probed(name, label, values)
    found = tradeoff.draw(load_config(None, keys), Records.of_names(every))
    assert f"{tmp_path}/words.png" in found.splitlines() and (tmp_path / "words.png").is_file()
