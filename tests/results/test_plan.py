"""A study's runs find what they need, are not repeated, and fail aloud."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from builders import ROOT, random_model

from ubmoe import owned
from ubmoe.config import ResultsSection, UserError, load_config
from ubmoe.recording import recording
from ubmoe.report import tables
from ubmoe.results import packed, plan, study
from ubmoe.results.records import pack


def config(tmp_path, *keys):
    given = [f"output_dir={tmp_path}/small", f"results.directory={tmp_path}/records", *keys]
    return load_config(None, given)


def kinds(steps):
    return [(step.row, step.result, step.config.seed) for step in steps]


def test_a_table_is_its_rows_by_seed_and_the_base_once(tmp_path):
    keys = ["results.rows=[base, ffn+attention, ffn causal]", "results.seeds=[3, 5]"]
    steps = study.steps(config(tmp_path, *keys, "results.table=2"))
    assert kinds(steps) == [
        ("base", "sts", 3),
        *((row, "sts", seed) for seed in (3, 5) for row in ("ffn+attention", "ffn causal")),
    ]
    assert steps[0].config.bi.stages == []
    assert steps[1].config.bi.stages[0].train == ["ffn", "attention"]
    assert [step.config.bi.attention for step in steps[1:3]] == ["bidirectional", "causal"]
    assert steps[2].config.output_dir.endswith("small/study/seed3/small-ffn-causal")
    third = study.steps(config(tmp_path, *keys, "results.table=3"))
    assert [step.result for step in third] == ["sts", "dependence"] * 5


@pytest.mark.parametrize("table", [2, 3, 4, "all"])
def test_every_run_finds_what_it_needs_in_an_earlier_one(tmp_path, table):
    steps = study.steps(config(tmp_path, f"results.table={table}"))
    made: set[str] = set()
    for step in steps:
        needed = [step.config.model.name, step.config.ubmoe.bi]
        for name in needed:
            if name is not None and name != "tiny":
                assert name in made, step.command
        out = step.config.output_dir
        made |= {"sts": {f"{out}/bi"}, "generation": {f"{out}/ubmoe"}}.get(step.result, set())
    assert len({step.path for step in steps}) == len(steps)
    programs = {step.program for step in steps}
    assert (("train_ubmoe.py",) in programs) == (table in (4, "all"))
    assert (("-m", "ubmoe.bitune") in programs) == (table == "all")


def finish(step):
    """What a program would leave; what it trains depends on how."""
    with recording("x", step.result, step.config) as run:
        run.model = random_model("qwen2")
        trains = {"sts": step.config.bi, "generation": step.config.ubmoe}.get(step.result)
        upstream = {"shift": 0.0}
        if step.after is not None:
            upstream = json.loads(step.after.path.read_text())
            run.section = {"bi_weights": upstream["environment"]["weights"]}
        shift = upstream["shift"]
        if trains is not None or step.after is None:
            shift = zlib.crc32(repr((step.config.model.name, trains, shift)).encode()) / 2**32
        run.more = {"shift": shift}
        # many numbers: one alone may be the same for two, once a fingerprint rounds it
        drawn = torch.Generator().manual_seed(int(shift * 2**32))
        with torch.no_grad():
            run.model.model.norm.weight.normal_(generator=drawn)
    if step.result in study.LEFT:
        step.left.mkdir(exist_ok=True)


def test_a_run_that_is_there_is_not_repeated_and_one_with_other_keys_is(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(plan, "execute", lambda step: (ran.append(step.row), finish(step)))
    keys = ["results.table=2", "results.seeds=[1]", "results.rows=[base, ffn]"]
    plan.run(config(tmp_path, *keys))
    assert ran == ["base", "ffn"]
    names = {path.name for path in (tmp_path / "records").iterdir()}
    assert names == {"small-base.sts.seed1.json", "small-ffn.sts.seed1.json"}
    assert "done in" in plan.plan(config(tmp_path, *keys))
    plan.run(config(tmp_path, *keys, "results.rows=[base, ffn, all]"))
    assert ran == ["base", "ffn", "all"]
    same = plan.plan(config(tmp_path, *keys, "dependence.max_texts=7", "bitune.rank=3"))
    assert same.count("done in") == 2
    changed = config(tmp_path, *keys, "evaluation.sts=[]")
    assert "run with other keys" in plan.plan(changed)
    plan.run(changed)
    assert ran == ["base", "ffn", "all", "base", "ffn"]


@pytest.mark.slow
def test_what_was_measured_of_another_encoder_is_measured_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        plan, "execute", lambda step: (ran.append((step.row, step.result)), finish(step))
    )
    keys = ["results.table=all", "results.seeds=[1]", "results.rows=[base, ffn, ffn causal]"]

    def again(*more):
        ran.clear()
        plan.run(config(tmp_path, *keys, *more))
        return set(ran)

    first = again()
    assert ("ubmoe", "dependence") in first and len(first) == 15
    assert again() == set()
    bitune = {(f"bitune {variant}", "bitune") for variant in study.BITUNE}
    base = {("base", result) for result in ("sts", "dependence", "evaluation")}
    assert again("bi.stages.0.max_steps=7") == first - base - bitune
    assert again("bi.stages.0.max_steps=7", "ubmoe.learning_rate=0.5") == {
        *((name, "generation") for name in study.MIXTURES),
        ("ubmoe", "dependence"),
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert again(f"model.name={tmp_path}/other") == first
    assert (
        again(f"model.name={tmp_path}/other", "evaluation.batch_size=7", "bitune.logging_steps=3")
        == set()
    )


def test_records_count_where_the_runs_are_gone_if_their_digests_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "execute", finish)
    monkeypatch.setattr("ubmoe.results.records.as_text", lambda *_: "")  # they are empty
    for name in ("model", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(99))
        (tmp_path / name / "a.tsv").write_text("pairs")
        (tmp_path / name / "chats.jsonl").write_text("chats")
        (tmp_path / name / "sentences.txt").write_text("a\nb")
    (tmp_path / "elsewhere" / "README.md").write_text("a card")

    def keys(name="model"):
        where = tmp_path / name
        return [
            *("results.table=3", "results.seeds=[1]", "results.rows=[ffn]"),
            *(f"model.name={where}", f"evaluation.sts=[{where}/a.tsv]"),
            f"bi.stages.0.dataset={where}/sentences.txt",
            f"dependence.dataset={where}/chats.jsonl",
        ]

    def states(name="model"):
        return [step.state() for step in study.steps(config(tmp_path, *keys(name)))]

    assert states() == ["missing", "missing"]
    plan.run(config(tmp_path, *keys()))
    shutil.rmtree(tmp_path / "small")
    assert states() == ["there", "there"]
    assert states("elsewhere") == ["there", "there"]  # the same bytes under another path
    assert plan.plan(config(tmp_path, *keys())).count("done in") == 2
    ran = []
    monkeypatch.setattr(plan, "execute", lambda step: (ran.append(step.result), finish(step)))
    plan.run(config(tmp_path, *keys()))
    assert ran == []
    pack(config(tmp_path, *keys()))
    assert states() == ["there", "there"] and not [*(tmp_path / "records").glob("*.json")]
    plan.run(config(tmp_path, *keys()))
    assert ran == []
    for file, expected in {
        "sentences.txt": ["other", "other"],
        "a.tsv": ["other", "other"],
        "model.safetensors": ["other", "other"],
        "chats.jsonl": ["there", "other"],
    }.items():
        path = tmp_path / "model" / file
        before = path.read_bytes()
        path.write_bytes(before[:-1] + b"c")  # as many bytes, rows and all
        assert states() == expected, file
        path.unlink()
        assert states() == expected, file
        path.write_bytes(before)
    assert states() == ["there", "there"]
    kept = packed.read(tmp_path / "records")
    packed.write(tmp_path / "records", {name: kept[name] for name in kept if ".sts." in name})
    plan.run(config(tmp_path, *keys()))
    assert ran == ["sts", "dependence"]  # which needs the model that is gone


def test_what_was_removed_is_made_again_all_the_way_down(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        plan, "execute", lambda step: (ran.append((step.row, step.result)), finish(step))
    )
    keys = ["results.table=all", "results.seeds=[1]", "results.rows=[ffn, ffn causal]"]
    plan.run(config(tmp_path, *keys))
    steps = study.steps(config(tmp_path, *keys))
    [last] = [step for step in steps if (step.row, step.result) == ("ubmoe", "dependence")]
    ran.clear()
    for step in steps:
        if step.result in study.LEFT:
            step.left.rmdir()
    plan.run(config(tmp_path, *keys))
    assert ran == []  # nothing needs them
    last.path.unlink()
    (tmp_path / "records" / "small-ubmoe.dependence.seed1.json").unlink()
    plan.run(config(tmp_path, *keys))
    assert ran == [("ffn", "sts"), ("ubmoe", "generation"), ("ubmoe", "dependence")]


def test_a_model_that_came_out_otherwise_makes_what_was_measured_of_it_stale(tmp_path, monkeypatch):
    ran, shifts = [], iter([0.0, 0.5])
    monkeypatch.setattr(plan, "execute", lambda step: ran.append(step.result) or other(step))

    def other(step):
        finish(step)
        if step.result == "sts":  # as on another device
            record = json.loads(step.path.read_text())
            record["environment"]["weights"] += str(next(shifts))
            step.path.write_text(json.dumps(record))
        else:
            read = json.loads(step.after.path.read_text())["environment"]["weights"]
            record = json.loads(step.path.read_text())
            record["environment"]["weights"] = read
            step.path.write_text(json.dumps(record))

    keys = ["results.table=3", "results.seeds=[1]", "results.rows=[ffn]"]
    plan.run(config(tmp_path, *keys))
    assert ran == ["sts", "dependence"]
    [encoder, dependence] = study.steps(config(tmp_path, *keys))
    encoder.left.rmdir()
    dependence.path.unlink()
    (tmp_path / "records" / "small-ffn.dependence.seed1.json").unlink()
    plan.run(config(tmp_path, *keys))
    assert ran == ["sts", "dependence", "sts", "dependence"]
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").iterdir()]
    assert len({record["environment"]["weights"] for record in records}) == 1


def test_a_result_of_a_version_without_weights_runs_again_once(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "execute", finish)
    keys = ["results.table=2", "results.seeds=[1]", "results.rows=[base]"]
    plan.run(config(tmp_path, *keys))
    [step] = study.steps(config(tmp_path, *keys))
    record = json.loads(step.path.read_text())
    del record["environment"]["weights"]
    step.path.write_text(json.dumps(record))
    assert step.state() == "other"
    plan.run(config(tmp_path, *keys))
    assert step.state() == "there"


def test_a_setting_that_an_older_version_lacked_counts_as_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "execute", finish)
    keys = ["results.table=2", "results.seeds=[1]", "results.rows=[ffn]"]
    plan.run(config(tmp_path, *keys))
    [step] = study.steps(config(tmp_path, *keys))
    record = json.loads(step.path.read_text())
    del record["config"]["bi"]["stages"][0]["lm_weight"]  # as if it had been added since
    step.path.write_text(json.dumps(record))
    assert step.state() == "there"
    [other] = study.steps(config(tmp_path, *keys, "bi.stages.0.lm_weight=1"))
    assert other.state() == "other"


@pytest.mark.parametrize("had", [False, True])
def test_what_bf16_auto_was_stands_beside_what_is_asked_now(tmp_path, monkeypatch, had):
    monkeypatch.setattr(plan, "execute", finish)
    keys = ["results.table=2", "results.seeds=[1]", "results.rows=[ffn]"]

    def asked(bf16: object):
        own = [f"{key}={json.dumps(bf16)}" for key in ("bi.stages.0.bf16", "evaluation.bf16")]
        return config(tmp_path, *keys, *own)

    plan.run(asked("auto"))
    [step] = study.steps(asked("auto"))
    record = json.loads(step.path.read_text())
    record["environment"]["bfloat16"] = had
    step.path.write_text(json.dumps(record))
    for bf16, state in (("auto", "there"), (had, "there"), (not had, "other")):
        [step] = study.steps(asked(bf16))
        assert step.state() == state
    record["environment"].pop("bfloat16")  # of an older version: nobody knows
    step.path.write_text(json.dumps(record))
    [step] = study.steps(asked(had))
    assert step.state() == "other"


def test_two_studies_in_one_folder_are_refused(tmp_path, monkeypatch):
    keys = ["results.table=2", "results.seeds=[1]", "results.rows=[base]"]
    given = config(tmp_path, *keys)

    def again(step):
        with pytest.raises(UserError, match="python -m ubmoe.results run already runs in "):
            plan.run(given)
        finish(step)

    monkeypatch.setattr(plan, "execute", again)
    assert plan.run(given).startswith("1 runs")


def test_a_failed_run_ends_the_study_with_its_last_line(tmp_path):
    keys = ["results.table=3", "results.rows=[base]", "results.seeds=[0]", "model.device=cpu"]
    wrong = config(tmp_path, *keys, "dependence.dataset=none.txt")
    encoder, _ = study.steps(wrong)
    finish(encoder)
    with pytest.raises(UserError, match=r"none.txt: cannot be read.*see .*dependence.log"):
        plan.run(wrong)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["small-base.sts.seed0.json"]


@pytest.mark.slow
def test_a_study_runs_as_a_program_and_its_commands_are_the_ones_it_ran(tiny_path, tmp_path):
    keys = ["results.table=2", "results.rows=[base]", "results.seeds=[0]", "model.device=cpu"]
    one = config(tmp_path, *keys, "evaluation.sts=[]")
    said = plan.run(one)
    assert said.startswith("1 runs in")
    [path] = (tmp_path / "records").iterdir()
    assert json.loads(path.read_text())["sts"]["tasks"] == {}
    [command] = [line for line in plan.plan(one).splitlines() if not line.startswith("#")]
    assert re.fullmatch(
        r"python train_bi.py \S+study-\w{8}.yaml seed=0 output_dir=\S+ 'bi.*'", command
    )
    given = load_config(Path(command.split()[2]))
    assert given == one.model_copy(update={"results": ResultsSection()})


def test_mixtures_without_their_encoder_are_refused(tmp_path):
    with pytest.raises(UserError, match="ubmoe-causal needs 'ffn causal'; add it"):
        study.steps(config(tmp_path, "results.table=4", "results.rows=[base, ffn]"))
    with pytest.raises(UserError, match="run needs one; expected 2, 3, 4 or all"):
        plan.run(config(tmp_path))
    with pytest.raises(UserError, match="expected one at least"):
        config(tmp_path, "results.rows=[]")


def test_a_plan_extrapolates_from_a_few_steps(tmp_path):
    one = config(tmp_path, "results.table=3", "results.rows=[ffn]", "results.seeds=[0]")
    step, dependence = study.steps(one)
    assert one.bi.stages[0].max_steps == 60
    log = [{"loss": 1.0}, {"step": 5, "seconds_per_step": 2.0, "train_runtime": 99.0}]
    result = {"seconds": 25.0, "sts": {"stages": [{"log": log, "rows": 4000}]}}
    assert plan.extrapolated(step, result) == 25 + 2 * 55
    epochs = dataclasses.replace(
        step, keys=(*step.keys, "bi.stages.0.max_steps=-1", "bi.stages.0.num_train_epochs=2")
    )
    assert plan.extrapolated(epochs, result) == 25 + 2 * (2 * (4000 // 64) - 5)
    measured = {"seconds": 25.0, "dependence": {"seconds": 3.0, "texts": 5}}
    assert plan.extrapolated(dependence, measured) == 25 + 3 * (400 / 5 - 1)
    lines = tmp_path / "lines.txt"
    lines.write_text("a line\n" * 7)
    keys = (f"dependence.dataset={lines}", "dependence.max_texts=null")
    every = dataclasses.replace(dependence, keys=(*dependence.keys, *keys))
    assert plan.extrapolated(every, measured) == pytest.approx(25 + 3 * (7 / 5 - 1))


@pytest.mark.slow
def test_a_timed_run_leaves_neither_models_nor_checkpoints(tiny_path, tmp_path):
    keys = ["results.table=2", "results.rows=[ffn]", "results.seeds=[0]", "model.device=cpu"]
    [step] = study.steps(config(tmp_path, *keys))
    said = plan.estimate(step, 2)
    assert re.fullmatch(r"about \S+ min and \S+ GB, from 2 steps, without scoring", said)
    folder = tmp_path / "small/study/timed/ffn"
    assert (folder / "sts.json").exists() and not [
        item for item in folder.iterdir() if item.is_dir()
    ]
    pace = json.loads((folder / "sts.json").read_text())["sts"]["stages"][0]["log"][-1]
    assert 0 < pace["seconds_per_step"] <= pace["train_runtime"]


@pytest.mark.slow
def test_a_plan_times_steps_once_and_says_what_it_cannot_time(tiny_path, tmp_path):
    keys = ["results.table=all", "results.rows=[base, ffn, ffn causal]", "results.seeds=[0]"]
    given = config(tmp_path, *keys, "results.timed_steps=2", "model.device=cpu", "bi.stages=[]")
    base = [step for step in study.steps(given) if step.row == "base"]
    assert plan.estimate(base[2], 2) == "not timed: it only scores"
    said = plan.estimate(base[1], 2)
    assert re.fullmatch(r"about \S+ min and \S+ GB, from 2 texts, without scoring", said)
    before = (tmp_path / "small/study/timed/base/dependence.json").stat().st_mtime_ns
    assert plan.estimate(base[1], 2) == said
    assert (tmp_path / "small/study/timed/base/dependence.json").stat().st_mtime_ns == before
    mixture = next(step for step in study.steps(given) if step.row == "ubmoe")
    assert "small-ffn/bi is not there yet" in plan.estimate(mixture, 2)
    assert "# ubmoe, seed 0, after ffn: not run" in plan.plan(
        config(tmp_path, *keys, "model.device=cpu")
    )


OWN = [
    "results.rows=[base, {name: 'ffn, 9 steps', keys: [bi.stages.0.max_steps=9, scan.every=3], "
    "seeds: [7, 8], measured: [evaluation, scan, swap, probing]}, "
    "{name: untrained late, keys: ['bi.stages=[]', 'bi.layers=none']}]",
    "results.seeds=[1]",
]


def test_rows_of_ones_own_have_keys_seeds_and_what_is_measured(tmp_path):
    steps = study.steps(config(tmp_path, *OWN, "results.table=2"))
    assert kinds(steps) == [
        ("base", "sts", 1),
        ("untrained late", "sts", 1),
        *(
            ("ffn, 9 steps", result, seed)
            for seed in (7, 8)
            for result in ("sts", "evaluation", "scan", "swap", "probing")
        ),
    ]
    assert steps[1].config.bi.layers == "none"
    assert steps[2].config.bi.stages[0].max_steps == 9
    assert steps[2].config.output_dir.endswith("small/study/seed7/small-ffn-9-steps")
    assert [step.config.model.name for step in steps[3:5]] == [str(steps[2].left)] * 2
    assert steps[3].config.bi.stages[0].max_steps == 9  # its keys are of all its runs
    assert steps[3].config.evaluation.sts == []  # scored where it was made
    assert steps[3].config.evaluation.language_model and steps[4].config.scan.every == 3
    assert (steps[5].config.model.name, steps[5].config.ubmoe.bi) == ("tiny", str(steps[2].left))
    [probed] = steps[6].config.probing.models
    assert (probed.label, probed.name) == ("ffn, 9 steps", str(steps[2].left))
    assert tables.trained({"config": steps[2].config.model_dump()}) == "ffn, 9 steps"
    untrained = study.steps(config(tmp_path, *OWN, "results.table=3"))[3]
    assert (untrained.row, untrained.result) == ("untrained late", "dependence")
    assert untrained.after is None and untrained.config.model.name == "tiny"


PROGRAMS = [
    "results.rows=[{name: ffn 9, keys: [bi.stages.0.max_steps=9], seeds: [7, 8]}, "
    "{name: joined, program: train_ubmoe, of: ffn 9, keys: [ubmoe.rank=3], seeds: [8]}, "
    "{name: twice read, program: bitune, keys: [bitune.rank=3]}]",
    *("results.seeds=[7]", "results.table=2"),
]


def test_rows_may_be_of_other_programs(tmp_path):
    steps = study.steps(config(tmp_path, *PROGRAMS))
    assert kinds(steps) == [
        ("ffn 9", "sts", 7),
        ("twice read", "bitune", 7),
        ("ffn 9", "sts", 8),
        ("joined", "generation", 8),
    ]
    assert steps[1].config.bitune.rank == 3 and steps[1].after is None
    assert steps[3].after is steps[2] and steps[3].config.ubmoe.bi == str(steps[2].left)
    assert steps[3].config.ubmoe.rank == 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("program: train_ubmoe, of: ffn, measured: [scan]", "measured is of what train_bi leaves"),
        ("program: bitune, of: ffn", "of is what train_ubmoe joins"),
    ],
)
def test_a_key_of_another_program_is_refused(tmp_path, row, said):
    rows = f"results.rows=[ffn, {{name: other, {row}}}]"
    with pytest.raises(UserError, match=f"results.rows: other: {said}, and its program is"):
        study.steps(config(tmp_path, rows, "results.table=2"))


@pytest.mark.parametrize("of", ["null", "other", "base"])
def test_a_mixture_of_no_row_is_refused(tmp_path, of):
    rows = f"results.rows=[base, {{name: joined, program: train_ubmoe, of: {of}}}]"
    with pytest.raises(UserError, match="results.rows: joined: of is .*; expected a row before it"):
        study.steps(config(tmp_path, rows, "results.table=2"))


def test_rows_of_ones_own_are_not_run_twice(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(plan, "execute", lambda step: (ran.append(step.result), finish(step)))
    plan.run(config(tmp_path, *OWN, "results.table=2"))
    assert len(ran) == 12
    plan.run(config(tmp_path, *OWN, "results.table=2"))
    assert len(ran) == 12
    with pytest.raises(UserError, match="results.rows: a tunes nothing that swap could exchange"):
        rows = "results.rows=[{name: a, keys: ['bi.stages=[]'], measured: [swap]}]"
        study.steps(config(tmp_path, rows, "results.table=2"))


def test_rows_that_are_none_leave_nothing_and_nothing_of_an_earlier_plan_goes(tmp_path):
    given = [
        "results.rows=[{name: a, keys: [bi.stage=3]}]",
        "results.rows=[base, {name: a, keys: [seed=x]}]",
        "results.rows=[{name: a, measured: [swap], keys: ['bi.stages=[]']}]",
        "results.rows=[{name: a, program: train_ubmoe}]",
    ]
    for rows in given:
        with pytest.raises(UserError):
            study.steps(config(tmp_path, "results.table=2", rows))
        assert not list(tmp_path.iterdir())
    study.steps(config(tmp_path, "results.table=2"))
    before = sorted(tmp_path.rglob("*"))
    assert any(item.suffix == ".yaml" for item in before)
    for rows in given:
        with pytest.raises(UserError):
            study.steps(config(tmp_path, "results.table=2", "seed=9", rows))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[fnn]", r"results.rows.0: got 'fnn', expected 'base', 'ffn'"),
        ("[{name: a, kys: []}]", r"results.rows.0.kys: unknown key; did you mean"),
        ("[{keys: []}]", "results.rows.0.name"),
    ],
)
def test_a_row_that_is_none_is_refused(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        config(tmp_path, f"results.rows={rows}")


def test_models_are_removed_once_nothing_missing_reads_them(tmp_path, monkeypatch):
    there = []

    def execute(step):
        if step.after is not None:
            there.append((step.row, step.result, step.after.left.exists()))
        finish(step)

    monkeypatch.setattr(plan, "execute", execute)
    keys = ["results.table=all", "results.seeds=[1]", "results.rows=[base, ffn, ffn causal]"]
    asked = config(tmp_path, *keys, "results.keep_models=false")
    plan.run(asked)
    assert len(there) == 8 and all(exists for _, _, exists in there)
    made = [step for step in study.steps(asked) if step.result in study.LEFT]
    assert made and not any(step.left.exists() for step in made)
    assert all(step.path.exists() for step in study.steps(asked))
    there.clear()
    plan.run(asked)
    assert not there


# --- what a row may touch -------------------------------------------------------------------------


def one_row(tmp_path, name, *more):
    row = json.dumps({"name": name, "keys": list(more)})
    return config(tmp_path, f"results.rows=[{row}]", "results.table=2", "results.seeds=[0]")


@pytest.mark.parametrize(
    "name", ["/some/folder", "../../up", "a/b", "..x", "~", "C:\\\\a", "yes: [1] # no", "3", "null"]
)
def test_no_rows_name_becomes_a_path(tmp_path, name, monkeypatch):
    if name == "~":
        with pytest.raises(UserError, match="results.rows: '~' cannot be a row's name"):
            study.steps(one_row(tmp_path, name))
        return
    ran = []
    monkeypatch.setattr(plan, "execute", lambda step, resume: ran.append(step) or finish(step))
    [step] = study.steps(one_row(tmp_path, name))
    assert step.config.results.row == step.row == name  # what tables and records call it
    study_folder = tmp_path / "small" / "study"
    assert Path(step.folder).parent == study_folder / "seed0"
    monkeypatch.setattr(plan, "extrapolated", lambda *_: 1.0)
    plan.estimate(step, 1)
    [timed] = ran
    assert Path(timed.config.output_dir).parent == study_folder / "timed"
    assert ".." not in Path(timed.config.output_dir).parts


MOVING = {
    "output_dir=/some/folder": "output_dir",
    "seed=5": "seed",
    "resume=auto": "resume",
    "dry_run=true": "dry_run",
    "results.row=other": "results",
    "results.directory=/some/folder": "results",
    "results={row: a, keep_models: false}": "results",
    "model.cache=/some/folder": "model.cache",
    "model={name: tiny, cache: /some/folder}": "model.cache",
}


@pytest.mark.parametrize("key", MOVING)
def test_no_rows_key_says_where_it_is_made(tmp_path, key):
    with pytest.raises(UserError, match=f"results.rows: a: its keys set {MOVING[key]}, which the"):
        study.steps(one_row(tmp_path, "a", key))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[{name: a/b}, {name: a-b}]", "'a/b' and 'a-b' would both be made in "),
        ("[{name: FFN}, ffn]", "'FFN' and 'ffn' would both be made in "),
        ("[{name: x \u0444}, {name: x \u4e2d}]", "would both be made in "),
        ("[{name: \u0444\u0444\u043d}]", "cannot be a row's name"),
        ("[ffn, ffn causal, {name: ubmoe}]", "'ubmoe' and 'ubmoe' would both be made in "),
        ("[ffn, ffn causal, {name: Bitune lora}]", "'Bitune lora' and 'bitune lora' would both"),
        ("[{name: a, program: bitune}, {name: A}]", "'a' and 'A' would both be made in "),
        ('[{name: "a\\nrm -r folder"}]', "cannot be a row's name; expected a line"),
        ('[{name: "a\\u2028b"}]', "cannot be a row's name; expected a line"),
        (f"[{{name: {'a' * 200}}}]", "cannot be a row's name; expected a line of at most 150"),
        ('[{name: a, keys: ["bi.prompt=a {text}\\n# b"]}]', "a: a line feed in its keys or in"),
    ],
)
def test_rows_that_collide_or_are_no_line_are_refused_before_anything_runs(
    tmp_path, rows, said, monkeypatch
):
    monkeypatch.setattr(plan, "execute", lambda step: pytest.fail("it runs"))
    table = "all" if "causal" in rows else 2
    given = config(tmp_path, f"results.rows={rows}", f"results.table={table}", "results.seeds=[0]")
    for verb in (plan.plan, plan.run):
        with pytest.raises(UserError, match=re.escape(said)):
            verb(given)


def test_a_line_feed_in_quotes_is_a_prompt(tmp_path):
    [step] = study.steps(one_row(tmp_path, "a", 'bi.prompt="Find:\\n{text}"'))
    assert step.config.bi.prompt == "Find:\n{text}" and "\n" not in step.command


@pytest.mark.parametrize("place", ["study", "study/seed0", "study/seed0/small-a"])
def test_a_study_follows_no_link(tmp_path, place):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "small" / place).parent.mkdir(parents=True)
    (tmp_path / "small" / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"small/{place} is in the way"):
        study.steps(one_row(tmp_path, "a"))
    assert not list((tmp_path / "elsewhere").glob("**/*.json"))


def test_a_study_removes_its_models_and_nothing_of_a_users(tmp_path, monkeypatch):
    def made(step):
        finish(step)
        step.left.rmdir()
        folder = Path(step.folder)
        for name in ("bi", "stages/0", "stages/1"):
            owned.claim(folder / name, "weights")
            (folder / name / "weights").write_text("1")
        for name in ("mine/novel.txt", "stages/1/notes.txt", "bi-copy/weights"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("mine")
        (folder / "adapters").symlink_to(folder / "mine")

    monkeypatch.setattr(plan, "execute", made)
    keys = ("results.rows=[ffn]", "results.table=2", "results.seeds=[0]")
    plan.run(config(tmp_path, *keys, "results.keep_models=false"))
    folder = tmp_path / "small" / "study" / "seed0" / "small-ffn"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {
        *("sts.json", "x.config.yaml", "mine/novel.txt", "bi-copy/weights"),
        *("stages/1/notes.txt", "stages/1/weights", "stages/1/.ubmoe"),
    }
    assert (folder / "adapters").is_symlink()


PARENT = """
import sys
from pathlib import Path
from ubmoe.config import load_config
from ubmoe.results import plan, study
import ubmoe.results.plan
[step] = study.steps(load_config(None, sys.argv[2:]))
plan.sys.executable = sys.argv[1]
plan.execute(step)
"""
CHILD = """#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from ubmoe import cli
def main(config):
    Path({mark!r}).write_text(str(os.getpid()))
    time.sleep(120)
sys.argv = ["a"]
cli.run("a", "", main)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_study_runs_ends_with_it(tmp_path, number):
    mark, child = tmp_path / "pid", tmp_path / "child"
    text = CHILD.format(python=sys.executable, root=str(ROOT), mark=str(mark))
    child.write_text(text)
    child.chmod(0o755)
    keys = [f"output_dir={tmp_path}/small", "results.table=2", "results.rows=[base]"]
    command = [sys.executable, "-c", PARENT, child, *keys, "results.seeds=[0]"]
    parent = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: mark.exists() and mark.read_text())
    process = int(mark.read_text())
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: not is_running(process))


def is_running(process):
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
