"""The table of encoders, from records written out by hand."""

import pytest

from studies.compare.blocks.encoders import SETS, mask
from studies.compare.pages import renewed
from studies.compare.published import published
from studies.compare.records import Records

FILES = {item: f"data/{item}" for item in SETS} | {"STSB": "STSB-test", "SICK-R": "SICK-R-test"}
FFN = [
    {"objective": "simcse", "train": ["ffn"], "lora": None, "max_steps": 40, "learning_rate": 5e-5}
]


def point(step, sts, lima):
    perplexity = {"lima": {"perplexity": lima}, "wikitext2_valid": {"perplexity": 20.0}}
    return {"step": step, "sts": {"average": sts}, "perplexity": perplexity, "distance": step / 1e4}


def record(scores, stages=(), points=(), seed=0, **bi):
    settings = {"attention": "causal", "form": "eol", "whiten": None, "stages": list(stages)} | bi
    config = {"model": {"name": "small"}, "bi": settings, "seed": seed, "results": {"row": "one"}}
    tasks = {FILES[name]: score for name, score in zip(SETS, scores, strict=False)}
    reports = [{"trainable": {"ffn": 30, "attention": 10}} for _ in stages]
    section = {"tasks": tasks, "stages": reports, "trajectory": list(points)}
    return {"config": config, "seconds": 90.0, "environment": {"parameters": 160}, "sts": section}


def lines(block, *records):
    named = {
        f"x{place}.sts.seed{item['config']['seed']}": item for place, item in enumerate(records)
    }
    text = renewed(f"<!-- {block}: some -->\n<!-- end -->", Records.of_names(named), [0, 1])
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[1:-1]]


def test_a_row_has_the_scores_and_the_lost_perplexity_of_its_seeds():
    points = [point(0, 70.0, 20.0), point(40, 75.0, 21.0)]
    header, _, untouched, row, *others = lines(
        "encoders",
        record([80.0] * 7, FFN, points),
        record([82.0] * 7, FFN, [point(0, 70.0, 20.0), point(40, 75.0, 22.2)], seed=1),
        record([70.0] * 6, whiten={"remove": 1}),
    )
    assert header == [
        *("model", "read as", "tuned", "seeds", *SETS, "average", "LIMA", "WikiText-2"),
        *("extra (%)", "minutes"),
    ]
    assert untouched == ["small", "EOL, causal, centred", "", "", *["70.00"] * 6, *[""] * 5, "1.50"]
    assert row[:4] == ["small", "EOL, causal", "ffn, 40 steps at 5e-5", "2"]
    assert row[4:] == [*["81.00 ±1.41"] * 8, "1.08 ±0.04", "1.00 ±0.00", "25.0", "1.50 ±0.00"]
    assert len(others) == len(published("sts")["sts"]["rows"])
    assert all(other[2].startswith("published: ") for other in others)


def test_two_rates_are_two_rows():
    slow = [FFN[0] | {"learning_rate": 2e-5}]
    rows = lines("encoders", record([80.0] * 7, FFN), record([82.0] * 7, slow))[2:4]
    assert [row[2] for row in rows] == ["ffn, 40 steps at 5e-5", "ffn, 40 steps at 2e-5"]


def test_published_averages_are_those_that_the_papers_print():
    [unsupervised] = [
        row for row in lines("encoders", record([1.0] * 7)) if row[1] == "unsupervised"
    ]
    assert unsupervised[11] == "76.25"  # SimCSE's own Table 5
    rows = published("sts")["sts"]["rows"]
    printed = {"GloVe": 61.32, "BERT-base": 56.70, "OPT-125M": 67.46, "OPT-350M": 69.02}
    for row in rows:
        if row["model"] in printed:
            assert sum(row["scores"]) / 7 == pytest.approx(printed[row["model"]], abs=0.006)


@pytest.mark.parametrize(
    ("bi", "words"),
    [
        ({"attention": "causal"}, "causal"),
        ({"attention": "bidirectional", "layers": "none"}, "causal"),
        ({"attention": "bidirectional", "layers": "all"}, "bidirectional"),
        ({"attention": "bidirectional", "keep_sink": True}, "bidirectional, sink kept"),
        ({"attention": "bidirectional", "layers": {"from": 2}}, "bidirectional in layers from 2"),
        ({"attention": "bidirectional", "layers": [1, 3]}, "bidirectional in layers 1, 3"),
    ],
)
def test_a_mask_is_named_by_its_keys(bi, words):
    assert mask(bi) == words
