"""The numbers that the papers print add up."""

import pytest

from studies.compare.published import published


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
