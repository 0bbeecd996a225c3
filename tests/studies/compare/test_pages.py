"""The generated tables of the pages."""

import json
import math
import re

import pytest
from builders import MODEL, RECORDS, ROOT, ROWS, SEEDS, encoder, recorded, study
from scipy.stats import t as student

from studies.compare import paired, runs
from studies.compare.pages import BLOCKS, PLACES, pages, renewed
from studies.compare.records import Records
from studies.compare.rows import SINK, run_rows
from ubmoe.config import UserError, load_config


def squeezed(text):
    """Without the spaces and dashes that align columns."""
    return re.sub(r" +", " ", re.sub(r"-+:", "---:", text))


def renewed_squeezed(*given):
    return squeezed(renewed(*given))


def test_generated_blocks_are_renewed_and_the_rest_is_left(config):
    record = json.loads(recorded(config).read_text())
    text = "a\n<!-- dependence: some -->\nold\nold\n<!-- end -->\nb"
    after = renewed_squeezed(text, Records.of_names({"some.dependence.seed5": record}), SEEDS)
    assert after.startswith("a\n<!-- dependence: some -->\n| tokens | texts | main |")
    assert "old" not in after and after.endswith("\n<!-- end -->\nb")
    assert "| 0-256 | 7 | 10.00 ±1.00 (20.00) | 60.00" in after
    assert (
        renewed_squeezed(after, Records.of_names({"some.dependence.seed5": record}), SEEDS) == after
    )


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
    }
    actual = renewed_squeezed(
        "<!-- sts: small -->\n<!-- end -->", Records.of_names(records), SEEDS
    ).splitlines()
    assert actual[1:-1] == [
        "| trained | seeds | A | DP-after |",
        "|---:|---:|---:|---:|",
        "| base | 1 | 39.00 | 45.00 |",
        "| ffn | 2 | 51.00 ±2.83 | 48.00 ±1.41 |",
        "| mntp ffn+attention (LoRA) then ffn | 1 | 29.00 | |",
    ]
    generation = {"tasks": {}, "metrics": {}, "average": None, "perplexity": 3.0}
    evaluated = dependence(0.0, "bi", 1) | {"generation": generation}
    again = renewed_squeezed(
        "<!-- sts: small -->\n<!-- end -->",
        Records.of_names(records | {"x-ffn.evaluation.seed1": evaluated}),
        SEEDS,
    ).splitlines()
    assert again[1].endswith("| DP-after | perplexity |")
    assert [line.split("|")[-2].strip() for line in again[3:-1]] == ["", "3.00", ""]
    sunk = dependence(47.0, "bi")
    sunk["dependence"] |= {"first": 20.0, "without_first": {"after": 58.0}}
    sink = renewed_squeezed(
        "<!-- sts: small -->\n<!-- end -->",
        Records.of_names(records | {"x-ffn.dependence.seed0": sunk}),
        SEEDS,
    ).splitlines()
    assert sink[1].endswith("| DP-after | first | after without first |")
    assert sink[4].endswith("| 48.00 ±1.41 | 20.00 | 58.00 |")


def test_changes_are_shown_with_their_intervals(monkeypatch):
    moved = {name: paired.Difference(2.0, lambda: (1.5, 2.25)) for name in SINK}
    moved[paired.BY_SINK] = paired.Difference(3.0, lambda: (2.5, 3.25))
    ratio = paired.Difference(1.5, lambda: (1.25, 2))
    actual = {"ffn": moved | {"perplexity": ratio, "per answer": None}}
    actual["attention"] = actual["ffn"] | {"first": None}
    monkeypatch.setattr(paired, "changes", lambda *_: actual)
    rows = encoder("x-ffn", 0, 50.0, ["ffn"]) | encoder("x-attention", 0, 60.0, ["attention"])
    text = f"<!-- change: {MODEL} -->\n<!-- end -->"
    lines = renewed_squeezed(text, Records.of_names(rows), SEEDS).splitlines()
    assert "| seeds | BIOSSES |" in lines[1] and "| perplexity over the base's |" in lines[1]
    losses = "1.50 (1.25 to 2.00) | | 2.00 (1.50 to 2.25) | 3.00 (2.50 to 3.25) |"
    assert lines[3].startswith("| attention | 1 | 61.00 | 61.00 |")
    assert lines[3].endswith(f"| {losses} | 2.00 (1.50 to 2.25) |")
    assert lines[4].startswith("| ffn | 1 | 51.00 |") and f"| {losses} 2.00" in lines[4]


def test_causal_controls_stand_beside_each_other(monkeypatch):
    both = [row for seed in (0, 1) for row in named(encoder("a", seed, 50.0 + seed, ["ffn"]))]
    causal = [row for seed in (0, 1) for row in named(encoder("b", seed, 40.0, ["ffn"]))]
    cells = dict.fromkeys(("perplexity", "per answer", paired.BY_SINK, *SINK))
    cells["DP-after"] = paired.Difference(2.0, lambda: (1.5, 2.25), (1.0, 3.0))
    actual = {"ffn": paired.AgainstControl(both, causal, cells)}
    monkeypatch.setattr(paired, "against_controls", lambda *_: actual)
    text = "<!-- controls: small -->\n<!-- end -->"
    line = renewed_squeezed(text, Records.of_names({}), SEEDS).splitlines()[3]
    moved = "2.00 (1.50 to 2.25; seeds 1.00 to 3.00)"
    assert line == f"| ffn | 2 | 51.50 ±0.71 | 41.00 ±0.00 | | | {moved} | | | |"


def test_masks_are_compared_over_pairs_of_runs_and_at_equal_sts(monkeypatch):
    def pairs(kind, *values):
        cells = [{"STS": gap, "DP-after": after} for gap, after in values]
        return {kind: [runs.Pair(kind, cell) for cell in cells]}

    every = pairs("ffn", (-1.0, 1.0), (1.0, 3.0), (3.0, 5.0), (5.0, 7.0))
    every["ffn"][0].cells["per answer"] = 0.5  # one alone
    for place in (1, 2, 3):
        every["ffn"][place].cells["perplexity, 9 answers of over 20 tokens"] = 0.5
        every["ffn"][place].cells["quiz, in points"] = 2.0
    monkeypatch.setattr(runs, "pairs", lambda *_: every)
    text = "<!-- masks: small -->\n<!-- end -->"
    lines = renewed_squeezed(text, Records.of_names({}), SEEDS).splitlines()
    whose = "| tuned bidirectionally against its causal control"
    assert lines[1] == f"{whose} | ffn, 4 pairs of runs | at equal STS |"
    spread = student.ppf(0.975, 3) * math.sqrt(20 / 3 / 4)
    actual = dict(line.strip("| ").split(" | ", 1) for line in lines[3:-1])
    assert actual["STS minus its"].rstrip(" |") == f"2.00 ({2 - spread:.2f} to {2 + spread:.2f})"
    after = f"4.00 ({4 - spread:.2f} to {4 + spread:.2f}) | 2.00 (2.00 to 2.00)"
    assert actual["DP-after minus its"] == after  # on the line 2 + gap
    ratio = actual["perplexity, 9 answers of over 20 tokens, over its"]
    assert ratio == "0.50 (0.50 to 0.50), n = 3"
    assert actual["quiz minus its"].startswith("2.00 (2.00 to 2.00), n = 3") and len(actual) == 4
    every |= pairs("attention", (1.0, 1.0), (2.0, 2.0), (4.0, 2.0), (5.0, 3.0))
    header = renewed_squeezed(text, Records.of_names({}), SEEDS).splitlines()[1]
    # all four embed better bidirectionally: no line says where they would embed alike
    kinds = "| ffn, 4 pairs of runs | at equal STS | attention, 4 pairs of runs |"
    assert header == f"{whose} {kinds}"
    every.clear()
    with pytest.raises(UserError, match="masks"):
        renewed_squeezed(text, Records.of_names({}), SEEDS)


def test_what_tuning_changes_stands_over_runs(monkeypatch):
    own = [runs.Pair("ffn", {"perplexity": 2.0, "STS": 1.0}) for _ in range(3)]
    own[0].cells["DP-after"] = own[1].cells["DP-after"] = 1.0  # two alone
    for item in own:
        item.cells["quiz, in points"] = 4.0
    none = [runs.Pair("attention", {"STS": 1.0}) for _ in range(3)]
    monkeypatch.setattr(runs, "changes", lambda *_: {"ffn": own, "attention": none})
    text = "<!-- runs: small -->\n<!-- end -->"
    lines = renewed_squeezed(text, Records.of_names({}), SEEDS).splitlines()
    assert lines[1].startswith("| tuned | runs | perplexity over the base's |")
    assert lines[3].startswith("| ffn | 3 | 2.00 (2.00 to 2.00) | | |") and len(lines) == 5
    assert lines[1].endswith("| quiz minus the base's |") and lines[3].endswith(
        "| 4.00 (4.00 to 4.00) |"
    )


def named(records):
    return run_rows("encoders", MODEL, Records.of_names(records), SEEDS)


def test_rows_stand_against_the_other_mask_and_correlations_by_mask(monkeypatch):
    rows = [
        paired.Match("ffn causal", 45.0, "ffn", 51.0, paired.Difference(1.5, lambda: (1.25, 2))),
        paired.Match("ffn", 51.0),
    ]
    monkeypatch.setattr(paired, "matches", lambda *_: rows)
    text = "<!-- equal: small -->\n<!-- end -->\n" + f"<!-- claim: {MODEL} -->\n<!-- end -->"
    lines = renewed_squeezed(text, Records.of_names(study(ROWS)), SEEDS).splitlines()
    assert lines[3:5] == [
        "| ffn | 51.00 | none | | |",
        "| ffn causal | 45.00 | ffn | 51.00 | 1.50 (1.25 to 2.00) |",
    ]
    cells = "0.50, n = 3 | 0.50, n = 3 | | | 0.50, n = 3 | |"
    assert lines[-3:-1] == [
        f"| DP-after, minus the base's (percentage points) | {cells}",
        f"| STS gained over the untrained model that reads alike | {cells}",
    ]


@pytest.mark.parametrize(("kind", "first"), [("generation", "m"), ("bitune", "t")])
def test_rows_that_a_study_names_stay_apart(kind, first):
    own = RECORDS[f"{first}.{kind}.seed0"]
    named = own | {"config": own["config"] | {"results": {"row": "joined long"}}}
    records = Records.of_names({f"{first}.{kind}.seed0": own, f"z.{kind}.seed0": named})
    block = {"generation": "mixture", "bitune": "bitune"}[kind]
    text = renewed_squeezed(f"<!-- {block}: {MODEL} -->\n<!-- end -->", records, SEEDS)
    rows = [line for line in text.splitlines() if line.startswith(("| learned", "| full", "| joi"))]
    assert len(rows) == 2 and "joined long |" in rows[1] and "joined long" not in rows[0]


def test_a_scanned_row_is_read_under_both_masks_with_either_pooling():
    scanned = [
        {"mean": {"score": number + 0.5}, "weighted_mean": {"score": number}} for number in (1, 2)
    ]
    records = encoder("a", 0, 50.0, ["ffn"]) | encoder("b", 0, 50.0, ["attention"])
    records |= encoder("c", 0, 50.0, ["embedding"])
    config = {"model": {"name": "bi"}, "seed": 0}
    records["a.scan.seed0"] = {"config": config, "scan": {"patterns": scanned}}
    stale = {"config": config, "scan": {"patterns": scanned}, "environment": {"weights": "old"}}
    records["c.scan.seed0"] = stale
    records["c.sts.seed0"]["environment"] = {"weights": "new"}
    text = f"<!-- poolings: {MODEL} -->\n<!-- end -->"
    lines = renewed_squeezed(text, Records.of_names(records), SEEDS).splitlines()
    assert lines[3:-1] == ["| ffn | 2.50 | 2.00 | 1.50 | 1.00 |"]


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
    actual = renewed_squeezed(
        "<!-- mixture: small -->\n<!-- end -->", Records.of_names(records), SEEDS
    ).splitlines()
    assert actual[1:-1] == [
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

    records = {
        "a.bitune.seed0": bitune("full", 4.0),
        "a.bitune.seed1": bitune("full", 6.0, 1),
        "c.bitune.seed0": bitune("lora", 7.0),
        "d.bitune.seed0": bitune("lora", 9.0, max_steps=0),
    }
    actual = renewed_squeezed(
        "<!-- bitune: small -->\n<!-- end -->", Records.of_names(records), SEEDS
    ).splitlines()
    assert actual[1:-1] == [
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
        actual = said | {
            "features": "word",
            "probe": "mlp",
            metric: value,
            f"{metric}_stderr": 0.01,
        }
        return actual | keys

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
    actual = renewed_squeezed(
        "<!-- probing: small -->\n<!-- end -->",
        Records.of_names({"small.probing.seed0": record}),
        SEEDS,
    ).splitlines()
    assert actual[1:-1] == [
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


def test_a_study_has_the_probes_of_its_rows_side_by_side():
    def probing(name, model, label, value, probe="linear"):
        row = {"task": "telicity", "split": "random", "control": "none", "position": "same"}
        row |= {"layer": -1, "features": "word", "probe": probe}
        row |= {"accuracy": value, "accuracy_stderr": 0.0}
        config = {"model": {"name": model}, "seed": 0}
        config["probing"] = {"data": "folder", "models": [{"label": label}], "probes": [probe]}
        section = {"models": [{"label": label, "rows": [row]}]}
        return {f"{name}.probing.seed0": {"config": config, "probing": section}}

    records = {
        **encoder("a", 0, 50.0, ["ffn"]),
        **probing("a", "bi", "ffn", 0.75),
        **encoder("b", 0, 50.0, []),
        **probing("b", f"Qwen/{MODEL}", "Uni", 0.5),
        **encoder("c", 0, 50.0, ["attention"]),
        **probing("c", "bi", "attention", 0.9, "mlp"),  # by another probe
        **encoder("d", 0, 50.0, ["embedding"]),
        **probing("d", "bi", "embedding", 0.9),  # of other words
    }
    records["d.probing.seed0"]["inputs"] = {"probing.data": "other"}
    actual = renewed_squeezed(
        f"<!-- probing: {MODEL} -->\n<!-- end -->", Records.of_names(records), SEEDS
    ).splitlines()
    assert actual[1] == "| task | split | metric | Uni | ffn |"
    assert actual[3] == "| telicity | random | accuracy | 0.500 ±0.000 (0.806) | 0.750 ±0.000 |"


PAGES = ["README.md"]
PAGES += sorted(f"{item.relative_to(ROOT)}" for place in PLACES for item in ROOT.glob(place))


@pytest.fixture(scope="module")
def shipped():
    """{page: its text, tables made anew}"""
    return pages(load_config(None, [f"results.directory={ROOT}/results"]), ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_the_pages_are_not_stale(page, shipped):
    assert shipped[ROOT / page] == (ROOT / page).read_text()


def test_the_pages_hold_a_table_of_every_kind():
    every = "".join((ROOT / page).read_text() for page in PAGES)
    there = set(re.findall(r"<!-- (\w+): ", every))
    assert there == {*BLOCKS, "benchmark"}
    assert " all |" in every and "ours/plain" in every


def test_a_block_may_say_its_own_seeds():
    def sts(seed):
        bi = {"stages": [{"objective": "simcse", "train": ["ffn"]}], "attention": "bidirectional"}
        config = {"model": {"name": "small"}, "bi": bi, "seed": seed}
        return {"config": config, "sts": {"tasks": {"A": 10.0 * seed}, "average": 10.0 * seed}}

    records = Records.of_names({f"x.sts.seed{seed}": sts(seed) for seed in (1, 3, 5)})
    text = "<!-- sts: small seeds 3 5 -->\n<!-- end -->"
    assert "| ffn | 2 | 40.00 ±14.14 |" in renewed_squeezed(text, records, SEEDS)
    with pytest.raises(UserError, match="no records of seeds 7 for the block sts: small"):
        renewed("<!-- sts: small seeds 7 -->\n<!-- end -->", records, SEEDS)


def test_a_scan_of_forms_shows_each_with_every_pooling():
    def pattern(form, name, mean, last):
        own = {"gain": 1.0, "interval": [0.0, 2.0]}
        both = {"mean": {"score": mean, "centred": mean + 9} | own, "last": {"score": last} | own}
        return {"form": form, "name": name, "layers": {"from": 1}} | both

    patterns = [pattern("eol", "none", 40, 77), pattern("eol", "all", 30, 3)]
    patterns += [pattern("plain", "none", 57, 20), pattern("plain", "all", 64, 10)]
    section = {"task": "dev", "pairs": 9, "depth": 30, "patterns": patterns}
    config = {"model": {"name": "small"}, "seed": 0, "scan": {"centre": True}}
    records = Records.of_names({"x.scan.seed0": {"scan": section, "config": config}})
    actual = renewed_squeezed("<!-- scan: x -->\n<!-- end -->", records, SEEDS).splitlines()
    assert actual[1] == "9 pairs of dev, Spearman x 100:"
    assert actual[-5:-1] == [
        "| eol | none | 40.00 / 49.00 | 77.00 |",
        "| eol | all | 30.00 / 39.00 | 3.00 |",
        "| plain | all | 64.00 / 73.00 | 10.00 |",
        "| plain | none | 57.00 / 66.00 | 20.00 |",
    ]


def test_a_scan_shows_its_best_patterns_and_both_ends():
    def pattern(name, score):
        own = {"score": score, "gain": score - 50, "interval": [score - 55, score - 45]}
        return {"name": name, "layers": name, "mean": own, "weighted_mean": own | {"score": 1.5}}

    patterns = [pattern("none", 50.0), pattern("all", 20.0)]
    patterns += [pattern(f"from {n}", 30.0 + n) for n in range(1, 29)]
    section = {"task": "dev", "pairs": 9, "depth": 30, "patterns": patterns}
    record = {"scan": section, "config": {"model": {"name": "small"}, "seed": 0}}
    records = Records.of_names({"x.scan.seed0": record})
    actual = renewed_squeezed("<!-- scan: x -->\n<!-- end -->", records, SEEDS).splitlines()
    assert actual[1] == "9 pairs of dev:"
    names = [row.split("|")[1].strip() for row in actual if row.startswith("| ")][1:]
    assert names == [
        *(f"from {n}" for n in range(28, 20, -1)),
        "none",
        "from 20",
        "from 19",
        "from 18",
        "all",
    ]
    assert (
        "| from 28 | 58.00 | +8.00 (+3.00 to +13.00) | 1.50 | +8.00 (+3.00 to +13.00) |" in actual
    )
