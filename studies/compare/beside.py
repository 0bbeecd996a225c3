"""A run's own numbers beside those of recorded runs with the same settings, and the published ones.

One seed tells little: beside it stand the mean over the recorded seeds, and their deviation.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from studies.compare.paper import compared, published_rows, settings_of
from studies.compare.records import Records
from studies.compare.rows import KINDS, RunRow
from ubmoe.config import numbered
from ubmoe.report.tables import aligned
from ubmoe.results.records import Record

SHOWN = {"sts": ("sts", 2), "generation": ("routes", 4)}  # kinds of rows, the paper's tables
OWN = "this run"  # no folder of a run has this name
# It splits a batch into forwards, and changes no loss.
SPLITS = "bi.stages.N.mini_batch_tokens"


def text(results: Mapping[str, dict[str, Any]], records: Records) -> str:
    """A table of one run's results by their names; empty where nothing stands beside any number."""
    named = {f"{OWN}.{kind}.seed{data['config']['seed']}": data for kind, data in results.items()}
    own = Records.of_names(named)
    both = Records([*own.by_name.values(), *records.by_name.values()])  # for a recorded encoder
    rows = [row for kind in SHOWN for record in own.of(kind) for row in _rows(record, both)]
    if not rows:
        return ""
    header = ["", "", "this run", "recorded", "seeds"]
    published = any("(" in row[3] for row in rows)
    brackets = " (published, recorded minus published)" if published else ""
    return (
        "Beside recorded runs with the same settings: mean ± standard deviation over seeds"
        f"{brackets}.\n{aligned([header, *rows])}"
    )


def _rows(record: Record, records: Records) -> Iterator[list[str]]:
    """A row for each number of an encoder, or of a mixture by its `ubmoe.route`."""
    kind, number = SHOWN[record.kind]
    runs = list(KINDS[kind](record.model, records))
    for run in runs:
        if run.record != record or run.route not in ("", record.section.get("route")):
            continue
        others = _with_the_same_settings(run, [one for one in runs if one.record.label != OWN])
        published = published_rows(number, record.model).get(run.row, {})
        for name, value in run.cells.items():
            repeats = name == "average" and len(run.scores) == 1
            if value is not None and not repeats and (others or name in published):
                cell = compared(run.row, others, name, published).replace("not run", "none")
                yield [run.row, name, f"{value:.2f}", cell, str(len(others))]


def _with_the_same_settings(own: RunRow, recorded: list[RunRow]) -> list[RunRow]:
    """One run for each seed; a setting that only one of two records has is not compared."""
    settings = _settings(own)
    by_seed: dict[int, RunRow] = {}
    for run in recorded:
        others = _settings(run)
        same_kind = (run.row, run.route, len(run.made)) == (own.row, own.route, len(own.made))
        if same_kind and all(settings[key] == others[key] for key in settings.keys() & others):
            by_seed.setdefault(run.record.seed, run)
    return [by_seed[seed] for seed in sorted(by_seed)]


def _settings(run: RunRow) -> dict[str, str]:
    return {key: value for key, value in settings_of(run).items() if numbered(key) != SPLITS}
