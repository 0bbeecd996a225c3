"""Ours beside the paper's: means of seeds, gaps, misprints, and nothing where nothing was run."""

from builders import MODEL, RECORDS, SEEDS, dependence, encoder, scores

from studies.compare import paper
from studies.compare.records import Records
from studies.compare.rows import by_row, run_rows
from ubmoe.config import load_config
from ubmoe.dependence import SHARES


def lines(number, shown=None, records=RECORDS, seeds=SEEDS):
    header, *body = paper.rows(number, MODEL, Records.of_names(records), seeds, shown)
    return header, {row[0]: row[1:] for row in body}


def test_sts_is_ours_with_the_published_and_the_gap():
    header, rows = lines(2, ["average"])
    assert header == ["row", "seeds", "average"]
    assert rows["ffn"] == ["2", "61.00 ±1.41 (66.96, -5.96)"]
    assert rows["ffn causal"] == ["1", "40.00"]
    assert rows["base"] == ["1", "34.00 (34.96, -0.96)"]
    assert rows["all"] == ["0", "not run (66.93)"]
    header, rows = lines(2)
    assert header[2] == "BIOSSES" and header[-1] == "average" and len(header) == 13
    assert rows["ffn"][1:3] == ["62.00 ±1.41 (54.01, +7.99)", "62.00 ±1.41 (69.73, -7.73)"]


def test_dependence_is_of_base_encoders_and_mixture():
    header, rows = lines(3)
    assert header[2:] == ["0-256", "256-512", "512-1024", "1024-2048"]
    assert rows["ffn, after"][:3] == ["2", "41.00 ±1.41 (34.40, +6.60)", "not run (39.55)"]
    assert rows["base, after"] == ["1", "30.00", "not run", "not run", "not run"]
    assert rows[f"{paper.UBMOE}, after"][1] == "33.00"
    assert rows["attention, main"][:2] == ["0", "not run (4.33)"]


def test_generation_is_of_base_mixture_encoders_and_bitune():
    header, rows = lines(4)
    tasks = ["mmlu", "winogrande", "truthfulqa_mc2", "average", "perplexity"]
    assert header[2:] == [*tasks, "STS bidirectional"]
    assert rows["base"][1] == "32.50 (32.50, +0.00)" and rows["base"][-2] == "4.00"
    assert rows["base"][-3] == "32.50 (other tasks)"  # an average of one task, not of three
    assert rows[paper.UBMOE][1] == "30.00 (28.10, +1.90)"
    again = ["1", "20.00", "not run", "not run", "20.00", "9.00", "60.00"]
    assert rows["ffn, read causally"] == again
    assert rows["bitune, full"] == [
        *("1", "31.00", "not run", "not run", "31.00", "other chats", "not run")
    ]


def test_a_model_of_no_table_has_ours_alone_and_misprints_are_said():
    config = load_config(None, ["model.name=Qwen/Qwen1.5-4B-Chat"])
    said = paper.text(3, config, Records.of_names({}))
    assert "its DP-after is probably 34.43" in said and said.count("Misprint") == 2
    other = paper.text("all", load_config(None, ["model.name=some/other"]), Records.of_names({}))
    assert other.count("Table") == 3 and "(" not in other.splitlines()[1]


def test_a_base_measured_in_an_encoders_folder_is_no_encoder():
    base = {"config": {"model": {"name": MODEL}, "seed": 1}}
    generation = {**scores(99.0, 1.0), "metrics": {"mmlu": "acc"}}
    records = RECORDS | {"a.evaluation.seed1": base | {"generation": generation}}
    records |= dependence("a", 1, f"Qwen/{MODEL}", 77.0)
    _, rows = lines(4, records=records)
    assert rows["ffn, read causally"][1] == "20.00"
    _, rows = lines(3, records=records)
    assert rows["ffn, after"][:2] == ["1", "40.00 (34.40, +5.60)"]


def test_the_base_has_no_seeds_and_untrained_bitune_is_no_variant():
    records = RECORDS | encoder("d", 5, 35.0, [])
    records["u.bitune.seed0"] = {
        "config": {"model": {"name": MODEL}, "seed": 0, "bitune": {"max_steps": 0, "rank": 8}},
        "bitune": {**scores(20.0, 1.0), "variant": "full", "metrics": {"mmlu": "acc"}},
    }
    assert lines(2, ["average"], records)[1]["base"][0] == "1"
    rows = lines(4, records=records)[1]
    assert (rows["bitune, full"][1], rows["bitune, pretrained"][1]) == ("31.00", "20.00")


def test_a_row_of_unlike_runs_says_in_what_they_differ():
    def notes(number, **changes):
        records = dict(RECORDS)
        for key, keys in changes.items():
            name = key.replace("__", ".")
            record = records[name]
            config = {
                section: record["config"].get(section, {}) | keys.get(section, {})
                for section in {*record["config"], *keys}
                if section != "seed"
            }
            records[name] = record | {"config": config | {"seed": record["config"]["seed"]}}
        return paper.notes(paper.NAMES[number], MODEL, Records.of_names(records), SEEDS)

    stages = [{"objective": "simcse", "train": ["ffn"], "learning_rate": 2.0}]
    second = {"bi": {"stages": stages, "prompt": "x"}, "evaluation": {"generation": ["a"]}}
    said = "Unlike runs in one row, ffn: bi.prompt, bi.stages.0.learning_rate."
    assert notes(2, a__sts__seed1=second) == [said]
    assert notes(2, a__sts__seed1={"model": {"device": "cuda"}}) == []  # where it ran
    tuned = said.replace("ffn:", "; ".join(f"ffn, {share}" for share in SHARES) + ":")
    assert notes(3, a__sts__seed1=second) == [tuned]  # by what made the measured model
    other = {"dependence": {"max_tokens": 64}}
    [alike] = notes(3, a__dependence__seed1=other)
    assert alike.endswith(": dependence.max_tokens.")
    assert notes(2, c__sts__seed0={"bi": {"prompt": "x"}}) == []  # one base is like itself
    prompt = {"a__sts__seed1": {"bi": {"prompt": "x"}}, "a__sts__seed0": {"bi": {"prompt": "y"}}}
    assert notes(3, **prompt)[0] == tuned.replace(", bi.stages.0.learning_rate", "")


def test_what_was_measured_of_another_model_stands_beside_none():
    def of(name, weights):
        return RECORDS[name] | {"environment": {"weights": weights}}

    records = RECORDS | {"a.sts.seed0": of("a.sts.seed0", "new")}
    records["a.dependence.seed0"] = of("a.dependence.seed0", "old")
    records["a.evaluation.seed0"] = of("a.evaluation.seed0", "old")
    assert lines(3, records=records)[1]["ffn, after"][:2] == ["1", "42.00 (34.40, +7.60)"]
    assert "ffn, read causally" not in lines(4, records=records)[1]
    records["a.dependence.seed0"] = of("a.dependence.seed0", "new")
    assert lines(3, records=records)[1]["ffn, after"][0] == "2"


def test_mixtures_of_unlike_encoders_are_noted():
    records = dict(RECORDS)
    for seed in (0, 1):
        encoded = records[f"a.sts.seed{seed}"]
        tuned = encoded["config"]["bi"] | {"prompt": str(seed)}
        config = encoded["config"] | {"bi": tuned}
        weights = {"weights": f"w{seed}"}
        records[f"a.sts.seed{seed}"] = encoded | {"config": config, "environment": weights}
        mixture = RECORDS["m.generation.seed0"]
        section = mixture["generation"] | {"bi_weights": f"w{seed}"}
        config = mixture["config"] | {"seed": seed}
        records[f"m.generation.seed{seed}"] = mixture | {"config": config, "generation": section}
    said = paper.notes("routes", MODEL, Records.of_names(records), SEEDS)
    assert f"Unlike runs in one row, {paper.UBMOE}: bi.prompt." in said


def test_what_was_measured_of_one_run_never_stands_beside_another_of_its_row():
    """The first folder lacks the perplexity, and the second the dependence."""
    control = encoder("z", 0, 99.0, ["ffn"])
    evaluated = {"z.evaluation.seed0": RECORDS["a.evaluation.seed0"]}
    records = {key: record for key, record in RECORDS.items() if key != "a.evaluation.seed0"}
    [first] = [
        run
        for run in run_rows("encoders", MODEL, Records.of_names(records | control | evaluated), [0])
        if run.row == "ffn"
    ]
    assert ("DP-after" in first.cells) != ("perplexity" in first.cells)
    whole = dependence("z", 0, "bi", 77.0)
    every = run_rows(
        "encoders", MODEL, Records.of_names(records | control | evaluated | whole), [0]
    )
    [first] = [item for item in every if item.row == "ffn"]
    assert (first.cells["average"], first.cells["DP-after"]) == (99.0, 77.0)  # of which more is


def test_bases_of_another_mask_flow_or_adapter_are_not_the_base():
    records = RECORDS | encoder("a0", 0, 20.0, [], "causal")
    for name, change in (
        ("b0", {"dependence": {"flow": "bidirectional"}}),
        ("b1", {"model": {"name": MODEL, "adapter": "some/lora"}}),
    ):
        [[_, record]] = dependence(name, 0, MODEL, 10.0).items()
        record["config"] |= change
        records[f"{name}.dependence.seed0"] = record
    rows = lines(2, ["average"], records)[1]
    assert rows["base"] == ["1", "34.00 (34.96, -0.96)"] and rows["base causal"] == ["1", "20.00"]
    rows = lines(3, records=records)[1]
    assert rows["base, after"][1] == "30.00"
    assert rows["base, bidirectional flow, after"][1] == "10.00"


def test_an_average_is_of_the_published_tasks_or_is_said_to_be_of_others():
    def evaluated(seed, *tasks):
        cells = {task: {"acc": 40.0} for task in tasks}
        section = {"tasks": cells, "average": 40.0, "perplexity": 1.0}
        metrics = dict.fromkeys(tasks, "acc")
        config = {"model": {"name": "bi"}, "seed": seed}
        return {"config": config, "generation": {**section, "metrics": metrics}, "evaluation": {}}

    def average(*seeds):
        records = dict(RECORDS)
        for seed, tasks in enumerate(seeds):
            records[f"a.evaluation.seed{seed}"] = evaluated(seed, *tasks)
        theirs = {"ffn, read causally": dict.fromkeys((*three, "average"), 42.0)}
        own = by_row("generation", MODEL, Records.of_names(records), SEEDS)
        row = "ffn, read causally"
        return paper.compared(row, own[row], "average", theirs[row])

    three = ("mmlu", "winogrande", "truthfulqa_mc2")
    assert average(three, three) == "40.00 ±0.00 (42.00, -2.00)"
    assert average((*three, "piqa"), (*three, "piqa")) == "40.00 ±0.00 (other tasks)"
    assert average(three, three[:1]) == "unlike tasks"


def test_only_runs_of_the_studys_seeds_are_averaged_and_missing_ones_are_counted():
    records = RECORDS | encoder("z", 42, 90.0, ["ffn"])
    del records["a.dependence.seed1"]
    assert lines(2, ["average"], records)[1]["ffn"][:2] == ["2", "61.00 ±1.41 (66.96, -5.96)"]
    assert lines(2, ["average"], records, [42])[1]["ffn"] == ["1", "90.00 (66.96, +23.04)"]
    config = load_config(None, [f"model.name=Qwen/{MODEL}"])
    assert "Not shown: runs of seed 42; see results.seeds." in paper.text(
        2, config, Records.of_names(records)
    )
    assert "Not shown" not in paper.text(2, config, Records.of_names(RECORDS))
    own = by_row("sts", MODEL, Records.of_names(records), SEEDS)["ffn"]
    own[1].scores["STS12"] = None
    assert paper.compared("ffn", own, "STS12", {}) == "61.00 of 1"


def test_a_second_run_of_one_row_and_seed_is_said_and_never_averaged():
    records = RECORDS | encoder("aa", 0, 10.0, ["ffn"])
    config = load_config(None, [f"model.name=Qwen/{MODEL}"])
    said = paper.text(2, config, Records.of_names(records))
    assert "Not shown: aa.sts.seed0, which says otherwise of ffn than a.sts.seed0." in said
    assert lines(2, ["average"], records) == lines(2, ["average"])
    same = RECORDS | encoder("aa", 0, 60.0, ["ffn"])
    assert "Not shown" not in paper.text(2, config, Records.of_names(same))


def test_shots_and_limits_are_said_beside_the_published_numbers():
    record = RECORDS["m.generation.seed0"]
    asked = {"shots": {"mmlu": 5, "group": None}, "limit": 100}
    records = RECORDS | {
        "m.generation.seed0": record | {"generation": record["generation"] | asked}
    }
    config = load_config(None, [f"model.name=Qwen/{MODEL}"])
    said = paper.text(4, config, Records.of_names(records))
    assert "Shots of ours: mmlu 5; the first 100 questions of each task." in said.splitlines()
    assert "Shots" not in paper.text(4, config, Records.of_names(RECORDS))
