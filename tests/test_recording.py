"""A result is written whole or not at all, recorded without paths, and printed without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT, random_model

from ubmoe import recording as results
from ubmoe.config import UserError, load_config
from ubmoe.results import pages as readme
from ubmoe.results.published import published

SEEDS = [0, 1, 2]
SECTION = {
    "overall": {"main": 10.0, "before": 60.0, "after": 30.0},
    "stderr": {"main": 1.0, "before": 2.0, "after": 3.0},
    "uniform": {"main": 20.0, "before": 40.0, "after": 40.0},
    "buckets": [
        {
            "range": [0, 256],
            "texts": 7,
            "main": 10.0,
            "before": 60.0,
            "after": 30.0,
            "stderr": {"main": 1.0, "before": 2.0, "after": 3.0},
            "uniform": {"main": 20.0, "before": 40.0, "after": 40.0},
        },
        {
            "range": [256, 512],
            "texts": 0,
            "main": None,
            "before": None,
            "after": None,
            "stderr": {"main": None, "before": None, "after": None},
            "uniform": {"main": None, "before": None, "after": None},
        },
    ],
    "layers": [],
    "texts": 7,
    "outside_buckets": 0,
    "truncated": 2,
    "tokens": 70,
}


def recorded(config, section=SECTION):
    with results.recording("calculate_dp", "dependence", config) as run:
        run.model = random_model("qwen2")
        run.section = section
    return run.path


@pytest.fixture
def config(tmp_path):
    return load_config(None, [f"output_dir={tmp_path}/runs/some", "seed=5"])


def test_what_an_interrupted_run_left_goes_when_the_result_is_there(config):
    left = Path(config.output_dir) / "dependence.partial-0-of-1.npz"
    left.parent.mkdir(parents=True)
    left.write_text("")
    with pytest.raises(KeyError), results.recording("calculate_dp", "dependence", config):
        raise KeyError
    assert left.exists()
    recorded(config)
    assert not left.exists()


def test_a_result_says_what_its_numbers_depend_on(config):
    result = json.loads(recorded(config).read_text())
    assert set(result) == {"config", "environment", "seconds", "peak_memory_bytes", "dependence"}
    assert result["dependence"] == SECTION
    assert result["config"] == config.model_dump()
    environment = result["environment"]
    assert environment["packages"]["torch"] and environment["seeds"] == [5]
    assert (environment["dtype"], environment["device"]) == ("float32", "cpu")
    assert result["peak_memory_bytes"] > 50e6  # torch alone takes more
    again = load_config(Path(config.output_dir) / "calculate_dp.config.yaml")
    assert again == config


def test_the_commit_is_edited_where_code_is_and_not_where_records_are(tmp_path, monkeypatch):
    def git(*words):
        given = ["-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words]
        subprocess.run(["git", *given], check=True, capture_output=True)

    files = [tmp_path / name for name in ("ubmoe/results.py", "train_bi.py", "results/a.json")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    git("init"), git("add", "."), git("commit", "-m", "a")
    monkeypatch.setattr(results, "__file__", str(files[0]))
    files[2].write_text("2")
    commit = results.git_commit()
    assert len(commit) == 40
    for path in files[:2]:
        path.write_text("2")
        assert results.git_commit() == f"{commit}+changes"
        path.write_text("1")


def test_a_failed_run_leaves_an_earlier_result_as_it_was(config):
    before = recorded(config).read_bytes()
    with pytest.raises(KeyError), results.recording("calculate_dp", "dependence", config):
        raise KeyError
    other = config.model_copy(update={"seed": 6})  # its resolved config would be another file
    with pytest.raises(ValueError, match="Out of range float"):
        recorded(other, SECTION | {"texts": float("nan")})
    folder = Path(config.output_dir)
    assert (folder / "dependence.json").read_bytes() == before
    assert load_config(folder / "calculate_dp.config.yaml") == config
    assert {path.name for path in folder.iterdir()} == {
        "dependence.json",
        "calculate_dp.config.yaml",
    }


def test_a_failed_first_run_leaves_nothing(config, tmp_path):
    with pytest.raises(KeyError), results.recording("calculate_dp", "dependence", config):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    results.write_json(path, {"a": 1})

    def disk_full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device", str(temporary))

    with pytest.raises(OSError, match="No space"):
        results.replace(path, disk_full)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_files_that_belong_together_give_way_together(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("old")
    second.mkdir()
    with pytest.raises(IsADirectoryError):
        results.replace_all({first: lambda p: p.write_text("new"), second: lambda p: None})
    assert first.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_an_output_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(None, [f"output_dir={tmp_path}/file/runs"])
    with (
        pytest.raises(UserError, match=r"output_dir: .*file/runs cannot be written \(Not a dir"),
        results.recording("calculate_dp", "dependence", config),
    ):
        pass


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
        written = results.record(again)
        assert written == f"{tmp_path}/records/some.dependence.seed{seed}.json"
        text = Path(written).read_text()
        assert str(tmp_path) not in text
        assert json.loads(text)["config"]["model"]["name"] == "mine"
    assert len(list((tmp_path / "records").iterdir())) == 2


def test_a_hub_id_is_no_path():
    assert results._without_paths({"name": ["Qwen/Qwen2.5-7B", "/a/b", "../c/d", "x/y:z"]}) == {
        "name": ["Qwen/Qwen2.5-7B", "b", "d", "x/y:z"]
    }


def test_the_table_shows_errors_the_uniform_share_and_empty_buckets(config):
    recorded(config)
    lines = results.table(config).splitlines()
    assert "Attention dependence of tiny, causal flow" in lines[0]
    assert "70 tokens, 2 texts cut" in lines[0]
    assert lines[2].split() == [
        *("0-256", "7", "10.00", "±1.00", "(20.00)", "60.00", "±2.00", "(40.00)"),
        *("30.00", "±3.00", "(40.00)"),
    ]
    assert lines[3].split() == ["256-512", "0"] + ["no", "texts"] * 3
    assert lines[4].split()[:3] == ["all", "7", "10.00"]


def test_generated_blocks_are_renewed_and_the_rest_is_left(config):
    record = json.loads(recorded(config).read_text())
    text = "a\n<!-- dependence: some -->\nold\nold\n<!-- end -->\nb"
    after = readme.renewed(text, {"some.dependence.seed5": record}, SEEDS)
    assert after.startswith("a\n<!-- dependence: some -->\n| tokens | texts | main |")
    assert "old" not in after and after.endswith("\n<!-- end -->\nb")
    assert "| 0-256 | 7 | 10.00 ±1.00 (20.00) | 60.00" in after
    assert readme.renewed(after, {"some.dependence.seed5": record}, SEEDS) == after


def test_encoders_stand_beside_each_other_over_their_seeds():
    def sts(average, *stages, seed=0):
        stages = [{"objective": o, "train": t, "lora": lora} for o, t, lora in stages]
        bi = {"stages": stages, "attention": "bidirectional"}
        config = {"model": {"name": "small"}, "bi": bi, "seed": seed}
        return {"config": config, "sts": {"tasks": {"A": average - 1}, "average": average}}

    def dependence(after, name, seed=0):
        config = {"model": {"name": name}, "seed": seed}
        return {"config": config, "dependence": {"overall": {"after": after}}}

    ffn = ("simcse", ["ffn"], None)
    records = {
        "x-ffn.sts.seed0": sts(50.0, ffn),
        "x-ffn.sts.seed1": sts(54.0, ffn, seed=1),
        "x-ffn.dependence.seed0": dependence(47.0, "bi"),
        "x-ffn.dependence.seed1": dependence(49.0, "bi", 1),
        "x-base.sts.seed0": sts(40.0),
        "x.dependence.seed0": dependence(45.0, "small"),
        "x-chain.sts.seed0": sts(30.0, ("mntp", ["ffn", "attention"], {"rank": 8}), ffn),
        "x-chain.dependence.seed0": dependence(99.0, "other"),  # not of the encoder
        "benchmark.y": {"rows": []},
    }
    found = readme.renewed("<!-- sts: small -->\n<!-- end -->", records, SEEDS).splitlines()
    assert found[1:-1] == [
        "| trained | seeds | A | average | DP-after |",
        "|---:|---:|---:|---:|---:|",
        "| base | 1 | 39.00 | 40.00 | 45.00 |",
        "| ffn | 2 | 51.00 ±2.83 | 52.00 ±2.83 | 48.00 ±1.41 |",
        "| mntp ffn+attention (LoRA) then ffn | 1 | 29.00 | 30.00 | not run |",
    ]
    generation = {"tasks": {}, "metrics": {}, "average": None, "perplexity": 3.0}
    evaluated = dependence(0.0, "bi", 1) | {"generation": generation}
    again = readme.renewed(
        "<!-- sts: small -->\n<!-- end -->", records | {"x-ffn.evaluation.seed1": evaluated}, SEEDS
    ).splitlines()
    assert again[1].endswith("| DP-after | perplexity |")
    assert [line.split(" | ")[-1] for line in again[3:-1]] == ["not run |", "3.00 |", "not run |"]


def test_mixtures_stand_beside_each_other_over_their_seeds():
    def mixture(seed, routes, attention="bidirectional", **keys):
        scores = {
            route: {"tasks": {"T": {"acc": value}}, "average": value, "perplexity": value / 10}
            for route, value in routes.items()
        }
        sts = [
            {"route": route, "attention": mask, "average": value + shift}
            for route, value in routes.items()
            for mask, shift in (("bidirectional", 1), ("causal", -1))
        ]
        config = {"model": {"name": "small"}, "seed": seed, "ubmoe": {"top_k": 2, **keys}}
        generation = {"routes": scores, "metrics": {"T": "acc"}, "bi_attention": attention}
        return {"config": config, "generation": generation, "sts": sts}

    records = {
        "a.generation.seed0": mixture(0, {"learned": 50.0, "uni": 60.0}, objective="chat"),
        "a.generation.seed1": mixture(1, {"learned": 54.0}, objective="chat"),
        "b.generation.seed0": mixture(0, {"learned": 55.0}, objective="both"),
        "c.generation.seed0": mixture(0, {"learned": 40.0}, "causal", objective="chat"),
        "a.sts.seed0": {"config": {"model": {"name": "small"}}},
        "base.evaluation.seed0": {"config": {"model": {"name": "small"}}, "generation": {}},
    }
    found = readme.renewed("<!-- mixture: small -->\n<!-- end -->", records, SEEDS).splitlines()
    assert found[1:-1] == [
        "| generates with | seeds | T | perplexity | STS bidirectional | STS causal |",
        "|---:|---:|---:|---:|---:|---:|",
        "| base (uni alone) | 1 | 60.00 | 6.00 | 61.00 | 59.00 |",
        "| learned, top_k 2, both | 1 | 55.00 | 5.50 | 56.00 | 54.00 |",
        "| learned, top_k 2, chat | 2 | 52.00 ±2.83 | 5.20 ±0.28 | 53.00 ±2.83 | 51.00 ±2.83 |",
        "| learned, top_k 2, chat, causally tuned expert | 1 | 40.00 | 4.00 | 41.00 | 39.00 |",
    ]


def test_variants_of_bitune_stand_beside_the_papers():
    def bitune(variant, perplexity, seed=0, max_steps=10):
        section = {"variant": variant, "perplexity": perplexity, "metrics": {"T": "acc"}}
        tasks = {"T": {"acc": perplexity * 10}}
        settings = {"max_steps": max_steps, "rank": 8}
        config = {"model": {"name": "small"}, "bitune": settings, "seed": seed}
        return {"config": config, "bitune": section | {"tasks": tasks}}

    records = {"a": bitune("full", 4.0), "b": bitune("full", 6.0, 1), "c": bitune("lora", 7.0)}
    records["d"] = bitune("lora", 9.0, max_steps=0)
    found = readme.renewed("<!-- bitune: small -->\n<!-- end -->", records, SEEDS).splitlines()
    assert found[1:-1] == [
        "| variant | seeds | perplexity | T | "
        "published average, Gemma-2B | published average, Llama3-8B |",
        "|---:|---:|---:|---:|---:|---:|",
        "| pretrained | 1 | 9.00 | 90.00 | 40.4 | 64.2 |",
        "| lora | 1 | 7.00 | 70.00 | 45.7 | 70.4 |",
        "| full | 2 | 5.00 ±1.41 | 50.00 ±14.14 | 49.7 | 72.7 |",
    ]


def test_probes_stand_beside_the_papers():
    def row(task, split, value, **keys):
        said = {"task": task, "split": split, "control": "none", "position": "same", "layer": -1}
        metric = "spearman" if task == "concreteness" else "accuracy"
        found = said | {"features": "word", "probe": "mlp", metric: value, f"{metric}_stderr": 0.01}
        return found | keys

    uni = [
        row("telicity", "random", 0.7),
        row("telicity", "random", 0.9, control="random labels"),
        row("telicity", "random", 0.9, layer=-2),
        row("telicity", "random", 0.9, position="previous"),
        row("telicity", "lemma", 0.6),
        row("word in context", "random", 0.5, features="cosine"),
        row("concreteness", "random", 0.4),
        row("object_animacy@4", "shipped", 0.55),
    ]
    models = [
        {"label": "Uni", "rows": uni},
        {"label": "Bi, untrained", "rows": [row("telicity", "random", 0.8)]},
    ]
    record = {"probing": {"models": models}, "config": {"probing": {"data": "folder"}}}
    found = readme.renewed(
        "<!-- probing: small -->\n<!-- end -->", {"small.probing.seed0": record}, SEEDS
    ).splitlines()
    assert found[1:-1] == [
        "| task | split | metric | Uni | Bi, untrained |",
        "|---:|---:|---:|---:|---:|",
        "| telicity | random | accuracy | 0.700 ±0.010 (0.839) | 0.800 ±0.010 |",
        "| telicity | lemma | accuracy | 0.600 ±0.010 | not run |",
        "| word in context (cosine) | random | accuracy | 0.500 ±0.010 (0.536) | not run |",
        "| concreteness | random | spearman | 0.400 ±0.010 (0.763) | not run |",
        "| object_animacy@4 | shipped | accuracy | 0.550 ±0.010 (0.510) | not run |",
        "",
        "Probes: mlp, of layer -1 (-1: the last). In brackets: published for Llama-2-7B.",
    ]


def test_published_rows_have_a_score_for_every_column_and_right_averages():
    tables = [*published("bitune").items(), *published("feng").items()]
    for name, table in tables:
        for row in table["rows"]:
            assert len(row["scores"]) == len(table["columns"]), (name, row)
            if table["columns"][-1] == "average":
                *scores, average = row["scores"]
                assert average == pytest.approx(sum(scores) / len(scores), abs=0.1), row


def test_the_papers_rows_add_up_where_no_misprint_is_flagged():
    wrong = []
    rounding = {"sts": 0.011, "dependence": 0.03, "generation": 0.1}  # of averages and of sums
    for name, table in published("ubmoe").items():
        for row in table["rows"]:
            assert len(row["scores"]) == len(table["columns"]), (name, row)
            if name == "dependence":
                off = max(abs(sum(triple) - 100) for triple in row["scores"])
            else:
                *scores, average = row["scores"]
                off = abs(sum(scores) / len(scores) - average)
            if off > rounding[name]:
                wrong.append(row)
    assert wrong == [
        row for table in published("ubmoe").values() for row in table["rows"] if "misprint" in row
    ]
    sizes = {name: len(table["rows"]) for name, table in published("ubmoe").items()}
    assert sizes == {"sts": 32, "dependence": 8, "generation": 8}


def test_the_tables_of_the_readme_are_not_stale():
    text = (ROOT / "README.md").read_text()
    config = load_config(None, [f"results.directory={ROOT}/results"])
    assert readme.renewed(text, results.recorded(config), SEEDS) == text
    assert text.count("| all |") >= 1 and text.count("ours/plain") >= 1


def test_a_table_needs_a_result(config):
    with pytest.raises(UserError, match="holds no result; run calculate_dp.py"):
        results.table(config)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], "Attention dependence"),
        (["results.table=all"], "Table 4"),
        (["results.action=figure"], "claim.png"),
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
            f"output_dir={config.output_dir}",
            *keys,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False") and expected in done.stdout
