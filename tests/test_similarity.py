"""Similarity is one section in every result, of whatever version."""

from pathlib import Path

import pytest

from ubmoe.results import packed
from ubmoe.similarity import sections

ROOT = Path(__file__).parents[1]
OLDER = {"tasks": {"a": 1.0}, "average": 1.0}
ROUTED = [OLDER | {"route": "bi", "attention": mask} for mask in ("causal", "bidirectional")]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"sts": OLDER | {"attention": "causal"}}, [OLDER | {"attention": "causal"}]),
        (
            {"sts": OLDER, "config": {"bi": {"attention": "causal"}}},
            [OLDER | {"attention": "causal"}],
        ),
        ({"evaluation": OLDER, "config": {"bi": {"attention": "causal"}}}, [OLDER]),
        ({"generation": {}, "sts": ROUTED}, ROUTED),
        ({"generation": {}, "sts": []}, []),
        ({"dependence": {}}, []),
    ],
)
def test_a_section_is_found_wherever_it_stands(result, expected):
    assert sections(result) == expected


def test_every_shipped_record_of_similarity_has_its_sections():
    counts = {"sts": 0, "generation": 0}
    for folder in sorted((ROOT / "studies").glob("*/")):
        for name, result in packed.read(folder).items():
            kind = name.split(".")[-2]
            if kind in counts:
                actual = sections(result)
                counts[kind] += len(actual)
                assert {item["attention"] for item in actual} <= {"causal", "bidirectional"}
                assert all({"tasks", "average"} <= set(item) for item in actual)
                assert [item["average"] for item in actual] == [
                    item["average"]
                    for item in (result["sts"] if kind == "generation" else [result["sts"]])
                ]
    assert counts["sts"] > 100 and counts["generation"] > 100
