"""What word vectors know, of the models of a study: all that were probed alike; and a picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ubmoe.config import leaves
from ubmoe.report import figures
from ubmoe.results.entries import by_row, first_measured, short_first
from ubmoe.results.records import Record, Records


def probed(model: str, records: Records, seeds: Sequence[int]) -> list[Record]:
    """The base's probing, and that of the first seed of every row; all of the same probes."""
    rows = by_row("encoders", model, records, seeds)
    ordered = sorted(rows, key=lambda row: (not row.startswith("base"), *short_first(row)))
    every = (first_measured(rows[row], "probing", records) for row in ordered)
    found = [each for each in every if each is not None]
    return [each for each in found if _asked(each) == _asked(found[0])]


def _asked(probing: Record) -> dict[str, Any]:
    """What decides the numbers of a probing, but for the models: its settings, and its words."""
    asked = leaves(probing.config, ["probing"])
    data = probing.data.get("inputs", {}).get("probing.data")
    return {key: value for key, value in asked.items() if ".models" not in key} | {"words": data}


def of_context(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What was found of each model that was asked what each of five words tells."""
    models = [model for record in records for model in record.section["models"]]
    return [each for each in models if any("@" in row["task"] for row in each["rows"])]


def figure(model: str, models: list[dict[str, Any]]) -> Figure:
    """What each word tells, a line a model."""
    found = figures.context(models)
    found.suptitle(model, fontsize=10)
    return found
