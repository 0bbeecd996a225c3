"""A program's last words: scores with their units, and every folder that it wrote."""

import logging

import pytest
from builders import random_model

from ubmoe import endings
from ubmoe.recording import recording

STS = {"tasks": {"a": 53.61, "b": 40.0}, "average": 46.805}
PROBES = [
    {"control": "none", "balanced_accuracy": 0.5},
    {"control": "none", "balanced_accuracy": 0.75},
    {"control": "none", "spearman": 0.1},
    {"control": "no context", "balanced_accuracy": 0.1},
]
GENERATION = {"metrics": {"piqa": "acc"}, "average": 51.26, "perplexity": 2.0341}


@pytest.mark.parametrize(
    ("name", "result", "expected"),
    [
        ("sts", {"sts": STS}, ["STS: 46.8 (Spearman x 100, mean of 2 tasks)"]),
        (
            "evaluation",
            {"evaluation": STS, "generation": GENERATION},
            [
                "STS: 46.8 (Spearman x 100, mean of 2 tasks)",
                "generation: 51.3 % (one task)",
                "perplexity of held-out answers: 2.03",
            ],
        ),
        (
            "generation",
            {"generation": GENERATION, "sts": [STS | {"route": "bi", "attention": "causal"}]},
            [
                "generation: 51.3 % (one task)",
                "perplexity of held-out answers: 2.03",
                "STS, bi, causal: 46.8 (Spearman x 100, mean of 2 tasks)",
            ],
        ),
        (
            "dependence",
            {"dependence": {"overall": {"main": 1.26, "before": 90.0, "after": 8.74}}},
            ["attention dependence: main 1.3, before 90.0, after 8.7 (% of attention)"],
        ),
        (
            "scan",
            {
                "scan": {
                    "patterns": [
                        {"name": "none", "layers": "none", "last": {"score": 30.0}},
                        {"name": "from 1", "layers": {"from": 1}, "weighted_mean": {"score": 45.39}}
                        | {"last": {"score": 31.0}},
                    ]
                }
            },
            ["STS, untrained: at best 45.4 (Spearman x 100), layers from 1, weighted mean"],
        ),
        (
            "probing",
            {"probing": {"models": [{"label": "base", "rows": PROBES}]}},
            ["probes: base 62.5 (balanced accuracy in %, mean of all)"],
        ),
        (
            "shift",
            {"shift": {"readings": {"model": {"perplexity": 2.04}, "in": {"perplexity": 3.5}}}},
            ["perplexity of held-out answers: model 2.04, in 3.50"],
        ),
        ("sts", {"sts": {"tasks": {}, "average": None}}, []),
        ("swap", {"swap": {"layers": []}}, []),
    ],
)
def test_scores_are_rounded_and_have_units(name, result, expected):
    assert list(endings.scores(name, result)) == expected


def test_a_run_ends_with_its_scores_and_what_it_wrote(config, caplog):
    caplog.set_level(logging.INFO)
    with recording("train_bi", "sts", config, "bi", "training.png") as run:
        run.place("bi").mkdir()
        (run.place("bi") / "config.json").write_text("{}")
        run.section, run.model = STS, random_model("qwen2")
    assert caplog.messages[-2:] == [
        "STS: 46.8 (Spearman x 100, mean of 2 tasks)",
        f"wrote in {config.output_dir}: bi/, sts.json",
    ]
