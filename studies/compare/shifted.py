"""The effect of exchanging the first token's share alone, for every run where it was measured."""

from collections.abc import Sequence
from typing import Any

from studies.compare.records import Records
from studies.compare.rows import base_first, by_row, measured_of


def shifted(model: str, records: Records, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """{row and seed: the `shift` section}, the rows in the order of tables."""
    rows = by_row("encoders", model, records, seeds)
    return {
        f"{run.row}, seed {run.seed}": record.section
        for runs in sorted(rows.values(), key=base_first)
        for run in runs
        if (record := measured_of(run.record, "shift", records)) is not None
    }
