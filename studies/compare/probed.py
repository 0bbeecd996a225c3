"""Word-level probing of the models of a study: all that were probed alike, by their rows."""

from collections.abc import Sequence
from typing import Any

from studies.compare.records import Records
from studies.compare.rows import all_run_rows, base_first, first_measured, grouped
from ubmoe.config import leaves
from ubmoe.results.records import Record

Model = dict[str, Any]  # as a record has it: a label, and a row a task


def probings(model: str, records: Records, seeds: Sequence[int]) -> list[Record]:
    """The base's probing, and that of the first seed of every row; all of the same probes."""
    rows = grouped(all_run_rows("encoders", model, records, seeds))  # the base's of every folder
    every = (
        first_measured(runs, "probing", records) for runs in sorted(rows.values(), key=base_first)
    )
    probed = [record for record in every if record is not None]
    return [record for record in probed if _probe_settings(record) == _probe_settings(probed[0])]


def _probe_settings(probing: Record) -> dict[str, Any]:
    """All that decides a probing's numbers except its models: the settings and the words."""
    asked = leaves(probing.config, ["probing"])
    data = probing.data.get("inputs", {}).get("probing.data")
    return {key: value for key, value in asked.items() if ".models" not in key} | {"words": data}


def of_context(records: Sequence[Record]) -> list[list[Model]]:
    """The models of each record that probed each of the five words of a context."""
    every = [
        [
            model
            for model in record.section["models"]
            if any("@" in row["task"] for row in model["rows"])
        ]
        for record in records
    ]
    return [models for models in every if models]
