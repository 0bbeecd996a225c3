"""Results are recorded without paths, and shown without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT, recorded, run

from studies.compare import records
from ubmoe.config import UserError, load_config
from ubmoe.report.tables import TEXT, model_of
from ubmoe.results import __main__ as results
from ubmoe.results.__main__ import table
from ubmoe.results.records import Record, read_result, record, without_paths


def test_a_record_keeps_seeds_apart_and_shows_no_path(tmp_path, config):
    name = str(tmp_path / "models" / "mine")
    for seed in (5, 6):
        again = config.model_copy(
            update={
                "seed": seed,
                "model": config.model.model_copy(update={"name": name}),
                "results": config.results.model_copy(update={"directory": f"{tmp_path}/records"}),
            }
        )
        recorded(again)
        written = record(again)
        assert written == f"{tmp_path}/records/some.dependence.seed{seed}.json"
        text = Path(written).read_text()
        assert str(tmp_path) not in text
        assert json.loads(text)["config"]["model"]["name"] == "mine"
    assert len(list((tmp_path / "records").iterdir())) == 2


def test_a_record_of_another_run_is_not_replaced(tmp_path, config):
    results = config.results.model_copy(update={"directory": f"{tmp_path}/records"})
    for _ in range(2):  # the same run, again
        first = config.model_copy(update={"results": results})
        recorded(first)
        written = Path(record(first)).read_bytes()
    dependence = config.dependence.model_copy(update={"max_texts": 3})
    changes = {"dependence": dependence, "output_dir": f"{tmp_path}/elsewhere/some"}
    other = first.model_copy(update=changes)
    recorded(other)
    with pytest.raises(UserError, match=r"seed5.json: is of another run \(dependence.max_texts\)"):
        record(other)
    assert Path(f"{tmp_path}/records/some.dependence.seed5.json").read_bytes() == written


def test_two_names_of_one_record_are_refused(config):
    with pytest.raises(UserError, match="x.sts.seed00.json is no record's name"):
        Record.named("x.sts.seed00", {})


def test_a_hub_id_is_no_path():
    assert without_paths({"name": ["Qwen/Qwen2.5-7B", "/a/b", "../c/d", "x/y:z"]}) == {
        "name": ["Qwen/Qwen2.5-7B", "b", "d", "x/y:z"]
    }


def test_the_table_shows_errors_the_uniform_share_and_empty_buckets(config):
    recorded(config)
    lines = table(config).splitlines()
    assert "Attention dependence of tiny, causal flow" in lines[0]
    assert "70 tokens, 2 texts cut" in lines[0]
    assert lines[2].split() == [
        *("0-256", "7", "10.00", "±1.00", "(20.00)", "60.00", "±2.00", "(40.00)"),
        *("30.00", "±3.00", "(40.00)"),
    ]
    assert lines[3].split() == ["256-512", "0"] + ["no", "texts"] * 3
    assert lines[4].split()[:3] == ["all", "7", "10.00"]


def test_a_table_of_a_study_without_runs_says_so(tmp_path):
    keys = [f"results.directory={tmp_path}", "results.table=2", "model.name=org/some"]
    said = table(load_config(None, keys)).splitlines()[-1]
    assert said.startswith(f"no run of some is recorded in {tmp_path}: python -m ubmoe.results run")


def test_a_table_needs_a_result(config):
    with pytest.raises(UserError, match="holds no result; run calculate_dp.py"):
        table(config)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["table"], "Attention dependence"),
        (["table", "results.table=all"], "Table 4"),
        (["figure"], "claim.png"),
    ],
)
def test_tables_and_pictures_are_made_without_torch(config, keys, expected):
    recorded(config)
    program = (
        "import sys, runpy; sys.argv = ['results', *sys.argv[1:]];"
        "runpy.run_module('ubmoe.results', run_name='__main__', alter_sys=True)"
    )
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules));"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys;" + check + program,
            *keys,
            f"output_dir={config.output_dir}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False") and expected in done.stdout


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"config": {}}, "no config in it"),
        ({"config": {"seed": 1}}, "no model.name in its config"),
        ({"config": {"seed": 1, "model": {"name": None}}}, "no model.name in its config"),
        ({"config": {"model": {"name": "a"}}}, "no seed in its config"),
        ({"config": {"seed": 1, "model": {"name": "a"}}}, "no sts in it"),
        ({"config": {"seed": 1, "model": {"name": "a"}}, "sts": None}, "no sts in it"),
    ],
)
@pytest.mark.parametrize("verb", [["table", "results.table=2"], ["figure"], ["readme"]])
def test_a_record_that_says_too_little_is_one_line(tmp_path, data, expected, verb):
    (tmp_path / "a.sts.seed1.json").write_text(json.dumps(data))
    given = [*verb, f"results.directory={tmp_path}", f"output_dir={tmp_path}/run"]
    code, output, errors = run(*given, script="-m ubmoe.results")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "a.sts.seed1.json: " in errors and expected in errors


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (None, "model"),
        ("runs/first", "model with first"),
        (["runs/first", "second"], "model with first and second"),
    ],
)
def test_a_record_is_named_by_its_model_and_its_adapters(adapter, expected):
    assert model_of({"config": {"model": {"name": "some/model", "adapter": adapter}}}) == expected


@pytest.mark.parametrize("verb", ["figure", "readme", "table"])
def test_what_compares_runs_says_that_it_needs_a_checkout(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    config = load_config(
        None, [f"output_dir={tmp_path}", "results.table=2", f"results.directory={tmp_path}"]
    )
    with pytest.raises(UserError, match="studies: not there; expected a checkout"):
        results.VERBS[verb](config)


def test_recorded_runs_stand_beside_a_run_in_a_checkout_alone(tmp_path, monkeypatch):
    bi = {"attention": "causal", "stages": [{"objective": "simcse", "train": ["ffn"]}]}
    for seed, average in ((1, 40.0), (2, 44.0), (3, 10.0)):
        settings = {"seed": seed, "model": {"name": "org/a"}, "bi": bi}
        if seed == 3:
            settings["bi"] = bi | {"pooling": "last"}
        section = {"tasks": {"x": average}, "average": average}
        path = tmp_path / f"a.sts.seed{seed}.json"
        path.write_text(json.dumps({"config": settings, "sts": section}))
    (tmp_path / "run").mkdir()
    result = json.loads((tmp_path / "a.sts.seed1.json").read_text())
    result["config"]["bi"]["pooling"] = "mean"
    (tmp_path / "run" / "sts.json").write_text(json.dumps(result))
    config = load_config(None, [f"output_dir={tmp_path}/run", f"results.directory={tmp_path}"])
    [line] = [
        line for line in results.table(config).splitlines() if " x  " in line and "ffn" in line
    ]
    assert line.split() == ["ffn", "causal", "x", "40.00", "42.00", "±2.83", "2"]
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert "±" not in results.table(config)


SOME = {"config": {"seed": 1, "model": {"name": "a"}, "bi": {"attention": "causal", "stages": []}}}


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("section", [{"a": 1}, {"tasks": [], "overall": 3, "models": {}}])
def test_a_record_of_any_json_is_named(tmp_path, config, kind, section):
    path = tmp_path / f"a.{kind}.seed1.json"
    path.write_text(json.dumps(SOME | {kind: section}))
    own = config.results.model_copy(update={"directory": str(tmp_path)})
    with pytest.raises(UserError) as caught:
        records.recorded(config.model_copy(update={"results": own}))
    assert str(caught.value).startswith(f"{path}: no {kind} as a run writes it")


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "null", "[]", '{"config": 3}', '{"config": {"a": 1e999}}']
)
def test_a_file_of_any_json_is_no_result(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="x.json: no result"):
        read_result(tmp_path / "x.json")
