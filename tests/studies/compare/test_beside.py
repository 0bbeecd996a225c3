"""A run's numbers stand beside the recorded ones of its very settings, and of no others."""

import copy
import statistics

import pytest
from builders import ROOT, TEN, encoder, published

from studies.compare import beside
from studies.compare.records import Records
from ubmoe.results import packed

TINY = packed.read(ROOT / "studies" / "tiny")
SEEDS = (0, 1, 2, 3, 4, 42)
DEMO = {"sts": "tiny-ffn.sts.seed42", "generation": "tiny-ubmoe.generation.seed42"}


def rows(results, records=TINY):
    """{(row, measure): [this run, recorded, seeds]}."""
    lines = beside.text(results, Records.of_names(records)).splitlines()[2:]
    actual = {}
    for line in lines:
        row, name, *cells = [item.strip() for item in line.split("  ") if item.strip()]
        actual[row, name] = cells
    return actual


def own(**names):
    return {kind: copy.deepcopy(TINY[name]) for kind, name in names.items()}


def test_the_demos_numbers_stand_beside_the_spread_of_its_six_seeds():
    actual = rows(own(**DEMO))
    every = [TINY[f"tiny-ffn.sts.seed{seed}"]["sts"]["average"] for seed in SEEDS]
    spread = f"{statistics.mean(every):.2f} ±{statistics.stdev(every):.2f}"
    assert actual["ffn", "tiny"] == ["50.99", spread, "6"]
    assert spread == "52.62 ±1.23"
    mixtures = [TINY[f"tiny-ubmoe.generation.seed{seed}"] for seed in SEEDS]
    both = [
        row["average"]
        for item in mixtures
        for row in item["sts"]
        if (row["route"], row["attention"]) == ("learned", "bidirectional")
    ]
    spread = f"{statistics.mean(both):.2f} ±{statistics.stdev(both):.2f}"
    learned = "learned, top_k 2, chat"
    assert actual[learned, "STS bidirectional"] == ["45.87", spread, "6"]
    assert actual[learned, "perplexity"][0] == "2.03"
    assert {row for row, _ in actual} == {"ffn", learned}  # no route but the run's own


def test_the_header_of_the_demos_yaml_says_these_numbers():
    actual = rows(own(**DEMO))
    header = " ".join((ROOT / "configs" / "tiny.yaml").read_text().split("\nmodel:")[0].split("#"))
    header = " ".join(header.split())
    numbers = [*actual["ffn", "tiny"], *actual["learned, top_k 2, chat", "STS bidirectional"]]
    one, first, six, other, second, also = numbers
    assert (six, also) == ("6", "6")
    assert f"STS {float(one):.1f} of bi/ and modes/, {float(other):.1f} of ubmoe/" in header
    (mean, sd), (low, narrow) = (
        [float(item) for item in cell.split(" ±")] for cell in (first, second)
    )
    assert f"STS is {mean:.1f} (SD {sd:.1f}) and {low:.1f} (SD {narrow:.1f})" in header


@pytest.mark.parametrize(
    ("key", "value", "seeds"),
    [
        ("mini_batch_tokens", 64, "6"),  # the batch is the same
        ("max_steps", 61, None),
        ("learning_rate", 0.002, None),
        ("train", ["attention"], None),
    ],
)
def test_other_settings_are_no_spread_of_a_run(key, value, seeds):
    results = own(sts=DEMO["sts"])
    results["sts"]["config"]["bi"]["stages"][0][key] = value
    actual = rows(results)
    assert actual.get(("ffn", "tiny"), [None])[-1] == seeds


def test_a_mixture_of_another_encoder_is_no_spread_of_a_run():
    results = own(**DEMO)
    results["sts"]["config"]["bi"]["stages"][0]["max_steps"] = 61
    results["sts"]["environment"]["weights"] = "others"
    results["generation"]["generation"]["bi_weights"] = "others"
    assert rows(results) == {}
    causal = own(generation="tiny-ubmoe-causal.generation.seed0")
    learned = "learned, top_k 2, chat, causally tuned expert"
    assert rows(causal, {n: TINY[n] for n in TINY if "causal" not in n}) == {}
    assert rows(causal)[learned, "perplexity"][-1] == "3"


def test_the_papers_cells_stand_there_whatever_was_recorded():
    [(name, record)] = encoder("a", 1, 60.0, ["ffn"]).items()
    theirs = next(
        row["scores"]
        for row in published("ubmoe")["sts"]["rows"]
        if (row["model"], row["method"]) == ("Qwen1.5-0.5B-Chat", "ffn")
    )
    actual = rows({"sts": record}, {})
    assert [actual["ffn", task] for task in TEN] == [
        [f"{record['sts']['tasks'][task]:.2f}", f"none ({score:.2f})", "0"]
        for task, score in zip(TEN, theirs, strict=False)
    ]
    two = {name: record, name.replace("seed1", "seed2"): seeded(record, 2, 64.0)}
    assert "(published, recorded minus" in beside.text({"sts": record}, Records.of_names(two))
    assert "(published" not in beside.text(own(**DEMO), Records.of_names(TINY))
    actual = rows({"sts": record}, two)["ffn", "STS12"]
    assert actual == ["61.00", f"62.50 ±2.12 ({theirs[2]:.2f}, {62.5 - theirs[2]:+.2f})", "2"]


def seeded(record, seed, score):
    again = copy.deepcopy(record)
    again["config"]["seed"] = seed
    again["sts"] |= {"tasks": dict.fromkeys(TEN, score), "average": score}
    return again


def test_nothing_is_said_where_nothing_stands_beside():
    [record] = encoder("a", 1, 60.0, ["ffn"]).values()
    record["config"]["model"]["name"] = "org/unknown"
    assert beside.text({"sts": record}, Records.of_names(TINY)) == ""
