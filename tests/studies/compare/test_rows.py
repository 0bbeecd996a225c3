"""Rows of tables: what a run is, its configuration says, whatever its row is called."""

import pytest
from builders import MODEL, SEEDS, causal, dependence, encoder, scores

from studies.compare import paired, runs, steps, tradeoff
from studies.compare.pages import renewed
from studies.compare.records import Records
from studies.compare.rows import (
    base_first,
    by_row,
    causal_controls,
    common_tasks,
    controls_of,
    reference,
    run_rows,
)


def named(records, row):
    for record in records.values():
        record["config"]["results"] = {"row": row}
    return records


def encoders(*records, seeds=SEEDS):
    every = Records.of_names({name: item for own in records for name, item in own.items()})
    return run_rows("encoders", MODEL, every, seeds)


def test_untrained_rows_come_first_and_a_run_beside_its_causal_control():
    untrained = ["base", "base causal", "base, layers from 11"]
    tuned = ["ffn", "ffn causal", "mntp", "ffn 20 steps", "ffn 20 steps causal", "mntp then simcse"]
    actual = [
        named(
            encoder(f"r{place}", 0, 50.0, [] if row in untrained else ["ffn"], mask),
            row,
        )
        for place, row in enumerate([*untrained, *tuned][::-1])
        for mask in ["causal" if "causal" in row else "bidirectional"]
    ]
    rows = [[encoder] for encoder in encoders(*actual)]
    assert [own[0].row for own in sorted(rows, key=base_first)] == [*untrained, *tuned]


@pytest.mark.parametrize("row", ["baseline ffn", "base", "base causal", "base, 60 steps"])
def test_a_tuned_row_is_no_base_whatever_it_is_called(row):
    base, tuned = encoder("a", 0, 40.0, []), named(encoder("b", 1, 60.0, ["ffn"]), row)
    own = {encoder.record.label: encoder for encoder in encoders(base, tuned)}
    assert (own["a"].role, own["b"].role) == ("base", "encoder")
    assert (own["b"].seed, own["b"].has_learnt, own["a"].has_learnt) == (1, True, False)
    assert own["b"].row != own["a"].row
    assert reference([own["b"], own["a"]]) is own["a"]
    assert not [
        encoder for encoder in encoders(base, tuned, seeds=[0]) if encoder.role == "encoder"
    ]


def test_an_untrained_row_is_the_base_whatever_it_is_called():
    base = named(encoder("a", 3, 40.0, []), "untouched")
    base |= named(dependence("a", 3, f"Qwen/{MODEL}", 30.0), "untouched")
    still = named(encoder("c", 0, 40.0, ["ffn"]), "no step")
    still["c.sts.seed0"]["config"]["bi"]["stages"][0]["max_steps"] = 0
    tuned = encoder("b", 0, 60.0, ["ffn"]) | dependence("b", 0, "bi", 35.0)
    own = {encoder.row: encoder for encoder in encoders(base, tuned, still)}
    assert own["no step"].is_base and not own["ffn"].is_base
    assert own["untouched"].is_base and own["untouched"].measures["DP-after"] == 30.0
    text = renewed(
        f"<!-- sts: {MODEL} -->\n<!-- end -->", Records.of_names(base | tuned), SEEDS
    ).splitlines()
    assert [line.split("|")[1].strip() for line in text[3:-1]] == ["untouched", "ffn"]


def test_the_whole_mask_is_what_others_are_held_against():
    late = named(encoder("a", 0, 50.0, []), "a")
    late["a.sts.seed0"]["config"]["bi"]["layers"] = {"from": 3}
    reads = named(encoder("b", 0, 40.0, [], "causal"), "b")
    whole = named(encoder("c", 0, 45.0, []), "c")
    assert reference(encoders(late, reads, whole)).row == "c"
    assert reference(encoders(late, reads)).row == "a"
    assert reference(encoders(encoder("d", 0, 45.0, ["ffn"]))) is None


def test_a_causal_control_is_known_by_its_settings_alone():
    run = named(encoder("a", 0, 60.0, ["ffn"]), "mine causal")
    control = named(encoder("b", 0, 50.0, ["ffn"], "causal"), "another")
    none = named(encoder("c", 1, 50.0, ["ffn"]), "no layer")
    none["c.sts.seed1"]["config"]["bi"]["layers"] = "none"
    other = named(encoder("d", 0, 50.0, ["attention"], "causal"), "mine causal causal")
    actual = encoders(
        run, control, none, other, named(encoder("e", 1, 61.0, ["ffn"]), "mine causal")
    )
    controls = {item.record.label: item.is_control for item in actual}
    assert controls == {"a": False, "b": True, "c": True, "d": True, "e": False}
    pairs = [(one.record.label, two.record.label) for one, two in causal_controls(actual)]
    assert pairs == [("a", "b")]  # nothing says of `e` which layers attend to later tokens
    whole = {name: item | {} for name, item in named(encoder("e", 1, 61.0, ["ffn"]), "x").items()}
    whole["e.sts.seed1"]["config"]["bi"]["layers"] = "all"
    pairs = [
        (one.record.label, two.record.label) for one, two in causal_controls(encoders(whole, none))
    ]
    assert pairs == [("e", "c")]
    assert controls_of([encoders(run), encoders(control)]) == {"another": "mine causal"}


def test_a_run_with_the_sink_kept_has_the_causal_control_of_older_records():
    run = named(encoder("a", 0, 60.0, ["ffn"]), "sink kept")
    run["a.sts.seed0"]["config"]["bi"] |= {"keep_sink": True, "form": None, "whiten": None}
    control = named(encoder("b", 0, 50.0, ["ffn"], "causal"), "another")
    [(one, two)] = causal_controls(encoders(run, control))
    assert (one.record.label, two.record.label) == ("a", "b")
    run["a.sts.seed0"]["config"]["bi"]["form"] = "eol"
    assert not causal_controls(encoders(run, control))


def test_a_collapsed_run_has_no_control():
    run, control = encoder("a", 0, 60.0, ["ffn"]), causal(encoder("b", 0, 50.0, ["ffn"]), 50.0)
    assert len(causal_controls(encoders(run, control))) == 1
    log = [{"positive_cosine": 1.0, "negative_cosine": 1.0}]
    run["a.sts.seed0"]["sts"]["stages"] = [{"log": log}]
    assert causal_controls(encoders(run, control)) == []


@pytest.mark.parametrize("task", ["average", "perplexity", "first", "DP-after", "STS causal"])
def test_a_task_stays_a_task_whatever_it_is_called(task):
    records = encoder("a", 0, 60.0, ["ffn"]) | dependence("a", 0, "bi", 35.0)
    records["a.sts.seed0"]["sts"]["tasks"] = {task: 12.0}
    [own] = encoders(records)
    assert (own.tasks, common_tasks([own]), own.mean([task])) == ({task}, [task], 12.0)
    assert own.measures == {"average": 60.0, "DP-after": 35.0}


def test_a_further_column_is_no_task():
    [own] = encoders(encoder("a", 0, 60.0, ["ffn"]))
    own.measures["entropy"] = 1.0
    assert "entropy" in own.cells and "entropy" not in common_tasks([own])


def test_a_mixture_is_a_mixture_whatever_its_row_is_called():
    sts = [
        {"route": route, "attention": "bidirectional", "average": 50.0} for route in ("half", "bi")
    ]
    section = {
        "routes": {route: scores(30.0, 5.0) for route in ("half", "bi", "uni")},
        "metrics": {"mmlu": "acc"},
        "bi_attention": "bidirectional",
    }
    config = {"model": {"name": MODEL}, "seed": 0, "ubmoe": {"top_k": 2, "objective": "chat"}}
    record = {"config": config | {"results": {"row": "a, causal base"}}, "generation": section}
    actual = {"m.generation.seed0": record | {"sts": sts}}
    rows = by_row("routes", MODEL, Records.of_names(actual), SEEDS)
    roles = {own[0].route: (own[0].role, own[0].is_control) for own in rows.values()}
    assert roles == {"half": ("mixture", False), "bi": ("mixture", False), "uni": ("base", False)}
    [point] = tradeoff.points(MODEL, Records.of_names(actual), SEEDS).values()  # half alone
    assert (point.kind, point.is_control) == ("mixture", False)


def test_a_generation_task_is_no_ratio_whatever_it_is_called():
    assert not runs.is_ratio(f"perplexity of birds{paired.IN_POINTS}")
    assert runs.is_ratio("perplexity") and runs.is_ratio("per answer")
    pair = runs.Pair("ffn", {f"perplexity of birds{paired.IN_POINTS}": -3.0})
    assert runs.mean_with_ci([pair] * 3, f"perplexity of birds{paired.IN_POINTS}").value == -3.0


def test_longer_tuning_begins_at_the_base_that_reads_alike():
    def tuned(name, count):
        actual = named(encoder(name, 0, 60.0, ["ffn"]), f"late {count}")
        actual[f"{name}.sts.seed0"]["config"]["bi"]["layers"] = {"from": 3}
        actual[f"{name}.sts.seed0"]["config"]["bi"]["stages"][0]["max_steps"] = count
        return actual

    late = named(encoder("b", 0, 45.0, []), "b")
    late["b.sts.seed0"]["config"]["bi"]["layers"] = {"from": 3}
    every = encoder("a", 0, 40.0, []) | late | tuned("c", 20) | tuned("d", 60)
    [longer] = steps.by_steps(MODEL, Records.of_names(every), SEEDS).values()
    assert longer.metrics[0] == [{"STS": 46.0}]
