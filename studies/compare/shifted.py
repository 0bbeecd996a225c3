"""What exchanging the first token's share alone does, of every run of which it was measured."""

from collections.abc import Sequence
from typing import Any

from studies.compare.entries import base_first, by_row, measured_of
from ubmoe.results.records import Records


def shifted(model: str, records: Records, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """{row and seed: the `shift` section}, the rows in the order of tables."""
    rows = by_row("encoders", model, records, seeds)
    return {
        f"{entry.row}, seed {entry.seed}": record.section
        for own in sorted(rows.values(), key=base_first)
        for entry in own
        if (record := measured_of(entry.record, "shift", records)) is not None
    }
