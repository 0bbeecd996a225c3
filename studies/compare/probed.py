"""What word vectors know, of the models of a study: all that were probed alike, by their rows."""

from collections.abc import Sequence
from typing import Any

from studies.compare.entries import all_entries, base_first, first_measured, grouped
from ubmoe.config import leaves
from ubmoe.results.records import Record, Records

Model = dict[str, Any]  # as a record has it: a label, and a row a task


def probings(model: str, records: Records, seeds: Sequence[int]) -> list[Record]:
    """The base's probing, and that of the first seed of every row; all of the same probes."""
    rows = grouped(all_entries("encoders", model, records, seeds))  # the base's of every folder
    every = (
        first_measured(own, "probing", records) for own in sorted(rows.values(), key=base_first)
    )
    found = [each for each in every if each is not None]
    return [each for each in found if _asked(each) == _asked(found[0])]


def _asked(probing: Record) -> dict[str, Any]:
    """What decides the numbers of a probing, but for the models: its settings, and its words."""
    asked = leaves(probing.config, ["probing"])
    data = probing.data.get("inputs", {}).get("probing.data")
    return {key: value for key, value in asked.items() if ".models" not in key} | {"words": data}


def of_context(records: Sequence[Record]) -> list[list[Model]]:
    """What was found of the models of each record that asked what each of five words tells."""
    every = [
        [
            each
            for each in record.section["models"]
            if any("@" in row["task"] for row in each["rows"])
        ]
        for record in records
    ]
    return [models for models in every if models]
