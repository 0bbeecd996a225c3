"""Results are recorded without paths, and shown without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT, recorded

from ubmoe.config import UserError
from ubmoe.report.tables import model_of
from ubmoe.results.__main__ import table
from ubmoe.results.records import record, without_paths


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
    ("adapter", "expected"),
    [
        (None, "model"),
        ("runs/first", "model with first"),
        (["runs/first", "second"], "model with first and second"),
    ],
)
def test_a_record_is_named_by_its_model_and_its_adapters(adapter, expected):
    assert model_of({"config": {"model": {"name": "some/model", "adapter": adapter}}}) == expected
