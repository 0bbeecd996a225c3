"""The picture of what word vectors know, of the models of a study."""

import pytest
from builders import MODEL, ROWS, SEEDS, dependence, encoder, study

from studies.compare import tradeoff
from studies.compare.probed import of_context, probings
from studies.compare.records import Records
from ubmoe.config import load_config
from ubmoe.report.figures import PALETTE, context

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
    """An encoder, whose row comes before the base's by its name, and the base in two folders."""
    base = encoder("z", 0, 50.0, []) | dependence("z", 0, f"Qwen/{MODEL}", 40.0)
    return Records.of_names(
        {
            **encoder("a", 0, 50.0, ["attention"]),
            **probed("a", "attention", KNOWN),
            **encoder("b", 0, 50.0, []),
            **probed("b", "Uni", CHANCE),
            **base,
        }
    )


def of_study(records):
    return [model for models in of_context(probings(MODEL, records, SEEDS)) for model in models]


def test_accuracy_by_word_is_a_line_a_model(records):
    [panel] = context(of_study(records), "small").axes
    lines = [line for line in panel.get_lines() if line.get_color() in ("black", PALETTE[0])]
    lines = [line for line in lines if len(line.get_xdata())]  # no dashed one: no token before
    assert [list(line.get_ydata()) for line in lines] == [CHANCE, KNOWN]  # the base's first
    assert [line.get_color() for line in lines] == ["black", PALETTE[0]]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3, 4, 5]] * 2


def test_models_of_one_label_and_more_than_there_are_colours_stay_apart(records):
    [model] = probed("c", "bi", KNOWN).values()
    [one] = model["probing"]["models"]
    [panel] = context([*of_study(records), *[one] * len(PALETTE)]).axes
    lines = [line for line in panel.get_lines() if len(line.get_ydata()) == 5]
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert len(lines) == len(set(looks)) == 2 + len(PALETTE)


def test_it_is_among_the_pictures_of_a_study_that_probed_two_models(records, tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    every = study(ROWS)
    assert "words.png" not in tradeoff.draw(load_config(None, keys), Records.of_names(every))
    every |= probed("r0", "Uni", CHANCE)
    assert "words.png" not in tradeoff.draw(load_config(None, keys), Records.of_names(every))
    every |= probed("r1", "ffn", KNOWN)
    actual = tradeoff.draw(load_config(None, keys), Records.of_names(every))
    assert f"{tmp_path}/words.png" in actual.splitlines() and (tmp_path / "words.png").is_file()
