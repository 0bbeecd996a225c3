"""Trajectories as tables: every point, runs at equal similarity, and what moved on the way."""

import math
from collections.abc import Sequence
from statistics import mean

from studies.compare import equal
from studies.compare.blocks.cells import noted
from studies.compare.records import Records
from studies.compare.rows import perplexity_ratio
from ubmoe.results.records import Record


def front_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each point of each trajectory: STS, lost perplexity, distance of the weights."""
    del name
    body = []
    for record in records.of("sts"):
        points = record.section.get("trajectory", []) if record.seed in seeds else []
        for place, point in enumerate(points):
            body.append(
                [
                    record.config["results"]["row"] if place == 0 else "",
                    str(point["step"]),
                    f"{point['sts']['average']:.2f}",
                    *(
                        f"{perplexity_ratio(points, place, text):.3f}"
                        for text in point["perplexity"]
                    ),
                    f"{100 * point['distance']:.2f}",
                ]
            )
    texts = list(points[0]["perplexity"]) if body else []
    header = ["run", "step", "STSB-dev", *texts, "moved (%)"]
    return noted([header, *body], [])


def equal_fronts_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Rows that differ in the mask, the modules or the loss alone, at equal similarity."""
    del name
    body = []
    for found in equal.comparisons(records, seeds):
        if found.scores:
            costs_by_text = [
                equal.cell(values, "{:.3f}", math.exp) for values in found.lost.values()
            ]
            cells = [f"{found.row}, over {found.other}", str(len(found.scores))]
            cells += [f"{mean(found.scores):.2f}", *costs_by_text]
            body.append([*cells, found.verdict(next(iter(found.lost)))])
    texts = list(found.lost) if body else []
    header = ["compared", "seeds", "STSB-dev", *texts, f"by {texts[0]}" if texts else ""]
    return noted([header, *body], [])


def moved_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """What a run changed from its first point to its last: attention dependence, and weights."""
    del name
    rows: dict[str, list[Record]] = {}
    for run in equal.tuned_on_the_way(records, seeds):
        rows.setdefault(run.config["results"]["row"], []).append(run)
    columns = {row: equal.moved(runs) for row, runs in rows.items()}
    names = list(dict.fromkeys(column for cells in columns.values() for column in cells))
    body = [
        [row, str(len(rows[row])), *(equal.cell(cells.get(column, [])) for column in names)]
        for row, cells in columns.items()
    ]
    return noted([["tuned", "seeds", *names], *body], [])
