"""The whole chain on the embedded model: nothing leaks, and both directions see what follows."""

import json
import shutil

import numpy as np
import pytest
from builders import run

from ubmoe.config import ProbingSection, UserError, load_config
from ubmoe.files import save_figure
from ubmoe.probing import __main__ as probing
from ubmoe.probing import experiment, rows
from ubmoe.probing.anisotropy import cosine_of_known, mean_of_known
from ubmoe.probing.rows import probed
from ubmoe.probing.tasks import read_tasks
from ubmoe.report import figures
from ubmoe.results.__main__ import table

KEYS = ["model.device=cpu", "probing.jobs=1"]


@pytest.fixture(scope="module")
def section(tiny_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing")
    keys = [*KEYS, f"output_dir={folder}", "probing.tasks=[context,wic]"]
    code, output, errors = run(*keys, script="-m ubmoe.probing")
    assert code == 0, errors
    assert output == f"{folder}/probing.json\n"
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"probing_context.png", "probing_anisotropy.png"}
    assert "subject_animacy@2" in table(load_config(None, [f"output_dir={folder}"]))
    return json.loads((folder / "probing.json").read_text())["probing"]


def accuracies(section, label, task, **keys):
    wanted = {"control": "none", "position": "same", "task": task, "split": "random"} | keys
    [model] = [model for model in section["models"] if model["label"] == label]
    return [
        (row["balanced_accuracy"], row["balanced_accuracy_stderr"])
        for row in model["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


BEFORE = {
    "subject_animacy": (1,),
    "verb_causative": (1, 2),
    "verb_dynamic": (1, 2),
    "object_animacy": (1, 2, 3, 4),
}


@pytest.mark.slow
def test_a_causal_model_knows_a_word_from_its_place_on_and_not_before(section):
    for feature, words in BEFORE.items():
        for word in range(1, 6):
            [(value, error)] = accuracies(section, "Uni", f"{feature}@{word}")
            if word in words:
                assert abs(value - 0.5) <= 3 * max(error, 0.01), (feature, word)
        [(at_the_word, _)] = accuracies(section, "Uni", f"{feature}@{words[-1] + 1}")
        assert at_the_word > 0.65, feature


@pytest.mark.slow
def test_the_tokens_before_know_as_little_of_a_later_word_in_a_causal_model(section):
    for feature, words in BEFORE.items():
        for word in words:
            [(value, error)] = accuracies(section, "Uni", f"{feature}@{word}", position="previous")
            assert abs(value - 0.5) <= 3 * max(error, 0.01), (feature, word)


@pytest.mark.slow
def test_in_both_directions_the_word_is_seen_from_before_it(section):
    actual = [accuracies(section, "Bi, untrained", f"{f}@1")[0] for f in BEFORE]
    assert max((value - 0.5) / error for value, error in actual) > 2, actual


@pytest.mark.slow
def test_random_labels_are_at_chance(section):
    for model in section["models"]:
        rows = [row for row in model["rows"] if row["control"] == "random labels"]
        within = [
            abs(row["balanced_accuracy"] - 0.5) <= 3 * max(row["balanced_accuracy_stderr"], 0.01)
            for row in rows
        ]
        assert len(rows) >= 20 and sum(within) >= 0.9 * len(rows)


@pytest.mark.slow
def test_differences_say_what_is_inside_noise(section):
    for row in section["differences"]:
        assert row["label"] == "Bi, untrained" and row["against"] == "Uni"
    assert {row["inside_noise"] for row in section["differences"]} == {True, False}


@pytest.mark.parametrize(
    ("score", "inside"), [(0.71, True), (0.89, True), (0.69, False), (0.91, False)]
)
def test_a_difference_is_noise_within_two_standard_errors_of_it(score, inside):
    """Errors of 0.03 and 0.04 make one of 0.05: 0.1 around 0.8 is noise."""
    same = dict.fromkeys(("task", "position", "layer", "features", "probe", "split"), "x")

    def report(label, value, error):
        row = same | {"control": "none", "spearman": value, "spearman_stderr": error}
        return {"label": label, "rows": [row, row | {"control": "random labels"}]}

    [actual] = experiment.differences([report("a", 0.8, 0.03), report("b", score, 0.04)])
    assert actual["difference"] == pytest.approx(score - 0.8)
    assert actual["noise"] == pytest.approx(0.1) and actual["inside_noise"] is inside


@pytest.mark.slow
def test_anisotropy_is_there_for_every_layer(section):
    for model in section["models"]:
        for kind in ("between", "within"):
            values = model["anisotropy"][kind]
            assert len(values) == 5 and all(-1 <= value <= 1 for value in values)
        assert model["anisotropy"]["between"][1:] != model["anisotropy"]["within"][1:]


def test_where_no_two_words_are_left_anisotropy_is_null_and_a_gap(tmp_path):
    one = np.array([[1.0, 2.0], [np.nan, np.nan]])
    assert cosine_of_known(one) is None and mean_of_known([None, None]) is None
    assert mean_of_known([cosine_of_known(np.ones((2, 2))), None]) == pytest.approx(1)
    model = {"label": "a", "anisotropy": {"between": [0.5, 0.25], "within": [None, 0.5]}}
    figure = figures.anisotropy([model])
    save_figure(figure, tmp_path / "a.png")
    for axes, first in zip(figure.axes, (0.5, np.nan), strict=True):
        drawn = np.asarray(axes.lines[0].get_ydata(), float)
        assert np.array_equal(drawn[:1], [first], equal_nan=True)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_models_that_are_done(tiny_path, tmp_path, caplog):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_path, encoder)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    models = f"probing.models=[{{name: tiny}}, {{name: {encoder}, label: encoder}}]"
    keys = [*KEYS, "probing.tasks=[concreteness]", "probing.jobs=1", "probing.controls=false"]
    caplog.set_level("INFO")
    logs = []
    for more in ([], ["probing.seeds=[1]"]):
        for _ in range(2):
            caplog.clear()
            given = [*keys, models, "resume=auto", f"output_dir={tmp_path}/run", *more]
            path = probing.main(load_config(None, given))
            logs.append(caplog.text)
    assert ["probed already" in log for log in logs] == [False, True, False, True]
    assert ["word vectors:" in log for log in logs] == [True, False, False, False]
    section = json.loads(path.read_text())["probing"]
    assert [model["attention"] for model in section["models"]] == ["causal", "bidirectional"]


def test_words_that_were_cut_away_are_left_out_and_none_left_is_said():
    settings = ProbingSection(probes=["linear"], seeds=[0])
    [task] = read_tasks("tiny", ["concreteness"])
    vectors = np.random.default_rng(0).normal(size=(len(task.words), 1, 8))
    vectors[::2] = np.nan
    rows = probed(task, vectors, "none", settings)
    assert {row["split"] for row in rows} == {"random", "lemma"}
    vectors[:] = np.nan
    with pytest.raises(UserError, match="512 cuts every word of concreteness away"):
        probed(task, vectors, "none", settings)


def test_models_need_labels_of_their_own():
    def labels(models):
        return list(experiment.models_by_label(load_config(None, [f"probing.models={models}"])))

    assert labels("[]") == ["Uni", "Bi, untrained"]
    other = "{name: a/tiny, attention: causal, route: half}"
    assert labels(f"[{{name: tiny}}, {other}]") == ["tiny", "tiny, causal, half"]
    with pytest.raises(UserError, match="two are called 'tiny'"):
        labels("[{name: tiny}, {name: tiny}]")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["probing.layers=[9]"], "probing.layers: 9; expected -5 to 4"),
        (["probing.data=none"], "none is no folder"),
        (["probing.models=[{{name: tiny, route: half}}]"], "is no mixture of two experts"),
        (["probing.tasks=[contxt]"], "expected 'context'"),
        (["probing.seeds=[]"], "expected one at least"),
    ],
)
def test_bad_input_is_one_last_line_and_exit_2(tiny_path, tmp_path, arguments, expected):
    arguments = [argument.format() for argument in arguments]
    code, output, errors = run(
        *KEYS, f"output_dir={tmp_path}/run", *arguments, script="-m ubmoe.probing"
    )
    assert (code, output) == (2, ""), errors
    assert "Traceback" not in errors and expected in errors.splitlines()[-1]


def test_labels_are_no_paths_and_share_no_files(tmp_path):
    labels = ["Bi, untrained", "bi untrained", "../../escaped", "/etc/passwd", "..", "", "猫", "犬"]
    labels.append("long " * 99)
    names = [experiment.file_name(label) for label in labels]
    assert len(set(names)) == len(labels)
    for name in names:
        (tmp_path / name).with_suffix(".report.npz").write_text("")
    assert len(list(tmp_path.iterdir())) == len(labels)


@pytest.mark.parametrize(("jobs", "expected"), [(10**9, 2), (1, 1), (None, -1)])
def test_no_more_processes_are_started_than_there_are_tasks(monkeypatch, jobs, expected):
    asked = []

    def parallel(n_jobs, **_):
        asked.append(n_jobs)
        return lambda work: [[] for _ in work]

    monkeypatch.setattr(rows, "Parallel", parallel)
    monkeypatch.setattr(rows, "_numbers", lambda *_: None)
    settings = ProbingSection(jobs=jobs, controls=False)
    assert rows.all_rows([None, None], np.zeros((1, 1, 1)), {}, [0], settings, "a") == []
    assert asked == [expected]
