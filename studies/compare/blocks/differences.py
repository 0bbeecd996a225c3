"""Tables of differences: to the base, to the causal control, over rows and runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studies.compare import paired
from studies.compare.blocks.cells import average_of, noted, score_of
from studies.compare.heads import HEADS
from studies.compare.records import Records
from studies.compare.rows import SINK, by_row, common_tasks
from studies.compare.shifted import shifted
from ubmoe.report.tables import part_of_whole


def change_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for what was trained on a model: its differences to the base, paired, with intervals.

    The STS tasks that all of the rows have as they are.
    """
    rows, changes = by_row("encoders", name, records, seeds), paired.changes(name, records, seeds)
    tasks = common_tasks([run for row in changes for run in rows[row]])
    columns = _differences("the base's", changes.values())
    body = [
        [row, str(len(rows[row])), *(score_of(rows[row], task) for task in tasks), *cells]
        for row, differences in sorted(changes.items())
        for cells in [[str(differences.get(column) or "") for column in columns]]
    ]
    return noted([["trained", "seeds", *tasks, *columns.values()], *body], [])


def _differences(whose: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of paired differences, as the tables call them; further perplexities if any."""
    after, *rest = ((column, f"{column} minus {whose}") for column in SINK)
    ratios = {"perplexity": f"perplexity over {whose}", "per answer": "each answer once"}
    present = {name for cells in rows for name, cell in cells.items() if cell is not None}
    further = sorted(column for column in present if column.startswith(paired.FURTHER))
    ratios |= {column: f"{column}, over {whose}" for column in further}
    return dict([*ratios.items(), after, (paired.BY_SINK, "of it by the sink's fall"), *rest])


def controls_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row tuned bidirectionally against its causal control: STS of each, and differences."""
    body, compared = [], paired.against_controls(name, records, seeds)
    columns = _differences("its", [pair.cells for pair in compared.values()])
    common = common_tasks([run for pair in compared.values() for run in (*pair.both, *pair.causal)])
    for row, pair in sorted(compared.items()):
        sts = [average_of(side, common) if common else "" for side in (pair.both, pair.causal)]
        cells = [str(pair.cells.get(column) or "") for column in columns]
        body.append([row, str(len(pair.both)), *sts, *cells])
    header = [
        "tuned bidirectionally",
        "seeds",
        "STS",
        "STS of its causal control",
        *columns.values(),
    ]
    return noted([header, *body], [])


def layers_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """In how many layers tuning raises DP-after, and how much of it the sink explains."""
    from studies.compare import sink  # imports matplotlib, which other blocks do not

    rows, body = sink.measured(name, records, seeds), []
    for row, moved in sink.layers(rows).items():
        rises = [
            f"{(change > 0).sum()} of {len(change)}" for change in (moved.after, moved.without)
        ]
        body.append([row, str(len(rows[row])), *rises, f"{moved.r_squared:.2f}"])
    raised = [f"layers with more {column}" for column in ("DP-after", "after without first")]
    return noted([["trained", "seeds", *raised, "R2 of the sink"], *body], [])


def swap_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """The cost of every swapped row's layers, together and alone, as per-answer means."""
    from studies.compare import swapped  # imports matplotlib, which other blocks do not

    body = []
    for row, swaps in swapped.swapped(name, records, seeds).items():
        whole, put, back = swaps.whole, swaps.changes("in"), swaps.changes("back")
        cells = [f"{change:+.2f}" for change in (whole, put.sum(), back.sum())]
        cells += [_largest(put), _largest(-back)]
        ranks = [swaps.rank_with_after(word) for word in ("in", "back")]
        cells += ["" if rank is None else f"{rank:.2f}" for rank in ranks]
        body.append([row, str(swaps.section["chats"]), *cells])
    header = ["tuned", "chats", "nats a token over the model's", "sum of each layer put in"]
    header += ["sum of each put back", "dearest put in", "best put back"]
    header += [
        f"rank of DP-after with {gain}, at equal depth" for gain in ("cost put in", "saving")
    ]
    return noted([header, *body], [])


def _largest(values: Any, count: int = 3) -> str:
    """The layers of the largest values, and these."""
    order = sorted(range(len(values)), key=lambda layer: -values[layer])[:count]
    return ", ".join(f"{layer} ({values[layer]:.2f})" for layer in order)


def shift_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Every run whose sink was exchanged: its attention, and the part of the loss due to it."""
    table = [["", "chats", *(f"{said}: {', '.join(EXCHANGED)}" for said in SHARES.values())]]
    sections = shifted(name, records, seeds)
    measured = {word for section in sections.values() for word in section["changes"]}
    words = [word for word in SHIFTED if word in measured]
    table[0] += [f"{SHIFTED[word]}{how}" for how in ("", ", each answer once") for word in words]
    table[0] += ["largest gap of a head, in and back", "left row by row, in and back"]
    for run, section in sections.items():
        cells = [run, str(section["chats"])]
        for share in SHARES:
            cells.append(
                ", ".join(f"{section['readings'][model][share]:.1f}" for model in EXCHANGED)
            )
        per_answer = {word: change["by_answer"] for word, change in section["changes"].items()}
        cells += [
            _change_of_loss(changes[word]) if word in changes else ""
            for changes in (section["changes"], per_answer)
            for word in words
        ]
        done = [section["exchanges"][word] for word in ("in", "back")]
        cells.append(", ".join(f"{exchange['gap']:.1f}" for exchange in done))
        cells.append(", ".join(f"{exchange['by_row']:.0f} %" for exchange in done))
        table.append(cells)
    if len(table) == 1:
        return ""
    return noted([list(measure) for measure in zip(*table, strict=True)], [])


EXCHANGED = ("model", "encoder", "in", "back")
SHARES = {"used": "first, as a causal row uses it", "first": "first", "after": "DP-after"}
SHIFTED = {
    "whole": "the encoder over the model",
    "in": "in: the model with the encoder's shares, over the model",
    "in elsewhere": "the same shifts on other heads",
    "in scaled": "the model's heads' outputs scaled as much",
    "back": "back: the encoder with the model's shares, over the encoder",
    "back elsewhere": "those shifts on other heads",
    "back scaled": "the encoder's heads' outputs scaled as much",
    "temperature": "the encoder at one temperature of its logits",
    "back over scaled": "back, over the scaled outputs",
    "back over temperature": "back, over the temperature",
}


def _change_of_loss(change: Mapping[str, Any]) -> str:
    """Nats a token, and the part of the whole where there is one."""
    said = "{:+.2f} ({:+.2f} to {:+.2f})".format(change["change"], *change["interval"])
    return "; ".join(filter(None, (said, part_of_whole(change))))


def questions_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Each row's change of the base's tasks, and Bitune's of its second causal set's."""
    tables = []
    for kind, said in (("causal_lm", "read causally"), ("bitune", "variant")):
        against, changes = paired.questions(kind, name, records, seeds)
        tasks = list(dict.fromkeys(task for cells in changes.values() for task in cells))
        body = [
            [row, *(str(cells[task] or "") for task in tasks)]
            for row, cells in sorted(changes.items())
        ]
        header = [said, *(f"{task}, minus {against}'s" for task in tasks)]
        tables.append(noted([header, *body], []))
    return "\n\n".join(filter(None, tables))


def equal_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Each row against the rows of the other mask that embed at least as well."""
    body = [
        [match.row, f"{match.sts:.2f}", match.other or "none", sts, str(match.ratio or "")]
        for match in sorted(paired.matches(name, records, seeds), key=lambda run: run.row)
        for sts in ["" if match.other_sts is None else f"{match.other_sts:.2f}"]
    ]
    header = [
        "trained",
        "STS",
        "of the other mask, nearest above",
        "its STS",
        "perplexity over its",
    ]
    return noted([header, *body], [])


def masks_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Bidirectional tuning against causal, over pairs of runs: their mean, and at equal STS."""
    from studies.compare import runs  # imports matplotlib, which other blocks do not

    kinds = runs.pairs(name, records, seeds)
    rows = [pair.cells for pairs in kinds.values() for pair in pairs]
    columns = {runs.GAP: "STS minus its"} | _differences("its", rows)
    lengths = [column for cells in rows for column in cells if paired.BY_LENGTH in column]
    columns |= {column: f"{column}, over its" for column in lengths}
    columns |= _head_columns(rows, ", minus its") | _tasks("its", rows)
    if not kinds:
        return ""
    table = [["tuned bidirectionally against its causal control", *columns.values()]]
    for kind, pairs in kinds.items():
        for equal in (False, True):
            means = [
                _over(runs.mean_with_ci(pairs, column, equal), len(pairs)) for column in columns
            ]
            said = "at equal STS" if equal else f"{kind}, {len(pairs)} pairs of runs"
            table += [[said, *means]] if any(means) else []
    transposed = [list(measure) for measure in zip(*table, strict=True) if any(measure[1:])]
    return noted(transposed, [])


def runs_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Every kind of run, by its mask: the changes of the base by tuning, over runs."""
    from studies.compare import runs  # imports matplotlib, which other blocks do not

    kinds = runs.changes(name, records, seeds)
    rows = [pair.cells for pairs in kinds.values() for pair in pairs]
    columns = _differences("the base's", rows)
    columns |= _head_columns(rows) | _tasks("the base's", rows)
    body = [
        [
            kind,
            str(len(pairs)),
            *(_over(runs.mean_with_ci(pairs, column), len(pairs)) for column in columns),
        ]
        for kind, pairs in kinds.items()
    ]
    body = [row for row in body if any(row[2:])]
    return noted([["tuned", "runs", *columns.values()], *body], [])


def _head_columns(rows: Iterable[Mapping[str, Any]], against: str = "") -> dict[str, str]:
    """The columns of what single heads do, as tables call them; they are changes of the base."""
    present = {column for cells in rows for column in cells}
    return {column: f"{said}{against}" for column, said in HEADS.items() if column in present}


def _tasks(whose: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of generation tasks, as tables call them."""
    columns = [column for cells in rows for column in cells if column.endswith(paired.IN_POINTS)]
    return {column: f"{column.removesuffix(paired.IN_POINTS)} minus {whose}" for column in columns}


def _over(mean: Any, every: int) -> str:
    """A mean over runs, and their number where not all of them have it."""
    if mean is None:
        return ""
    return f"{mean}, n = {mean.runs}" if mean.runs < every else str(mean)


def claim_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Correlations of lost generation, over all rows, over those of one mask, and over seeds."""
    from studies.compare import claim  # imports matplotlib, which other blocks do not

    def cell(runs: list[claim.Tuned], cause: str, per_answer: bool = False) -> str:
        if len({run.settings for run in runs}) < 3:
            return ""
        return str(claim.correlation(runs, cause, per_answer))

    tuned = claim.tuned(name, records, seeds)
    body = []
    for cause, label in claim.CAUSES.items():
        known = [run for run in tuned if cause in run.causes]
        answered = [run for run in known if run.per_answer is not None]
        masks = [[run for run in known if run.is_control is causal] for causal in (False, True)]
        cells = [
            *(cell(chosen, cause) for chosen in (known, *masks)),
            cell(answered, cause, per_answer=True),
        ]
        cells += [cell(claim.of_equal_steps(known), cause)]
        cells.append(str(claim.over_seeds(known, cause) or ""))
        body += [[label, *cells]] if known else []
    header = [
        "lost generation correlates with",
        "all rows",
        "tuned bidirectionally",
        "tuned causally",
    ]
    header += ["all rows, each answer once", "rows of equal steps"]
    header += ["over the seeds of a row, all rows as one"]
    return noted([header, *body], [])
