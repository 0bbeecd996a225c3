"""Tables of differences: to the base, to the twin under the other mask, over rows and runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studies.compare import paired
from studies.compare.blocks.cells import average_of, noted, score_of
from studies.compare.entries import SINK, by_row, common_tasks
from studies.compare.heads import HEADS
from studies.compare.shifted import shifted
from ubmoe.report.tables import part_of_whole
from ubmoe.results.records import Records


def change_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for what was trained on a model: its differences to the base, paired, with intervals.

    The STS tasks that all of the rows have as they are.
    """
    rows, found = by_row("encoders", name, records, seeds), paired.changes(name, records, seeds)
    tasks = common_tasks([each for row in found for each in rows[row]])
    columns = _differences("the base's", found.values())
    body = [
        [row, str(len(rows[row])), *(score_of(rows[row], task) for task in tasks), *cells]
        for row, own in sorted(found.items())
        for cells in [[str(own.get(column) or "") for column in columns]]
    ]
    return noted([["trained", "seeds", *tasks, *columns.values()], *body], [])


def _differences(whose: str, found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of paired differences, as the tables call them; further perplexities if any."""
    after, *rest = ((column, f"{column} minus {whose}") for column in SINK)
    ratios = {"perplexity": f"perplexity over {whose}", "by answer": "each answer once"}
    told = {name for cells in found for name, cell in cells.items() if cell is not None}
    further = sorted(each for each in told if each.startswith(paired.FURTHER))
    ratios |= {each: f"{each}, over {whose}" for each in further}
    return dict([*ratios.items(), after, (paired.BY_SINK, "of it by the sink's fall"), *rest])


def twins_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row tuned both ways, against the same tuned causally: STS of each, and differences."""
    body, found = [], paired.twins(name, records, seeds)
    columns = _differences("its", [each.cells for each in found.values()])
    common = common_tasks([each for own in found.values() for each in (*own.both, *own.causal)])
    for row, own in sorted(found.items()):
        sts = [average_of(each, common) if common else "" for each in (own.both, own.causal)]
        cells = [str(own.cells.get(column) or "") for column in columns]
        body.append([row, str(len(own.both)), *sts, *cells])
    header = ["tuned both ways", "seeds", "STS", "STS of its causal twin", *columns.values()]
    return noted([header, *body], [])


def layers_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """In how many layers tuning raises what, and what of it over layers is the sink's."""
    from studies.compare import sink  # imports matplotlib, which other blocks do not

    rows, body = sink.measured(name, records, seeds), []
    for row, moved in sink.layers(rows).items():
        rises = [f"{(each > 0).sum()} of {len(each)}" for each in (moved.after, moved.without)]
        body.append([row, str(len(rows[row])), *rises, f"{moved.explained:.2f}"])
    raised = [f"layers with more {each}" for each in ("DP-after", "after without first")]
    return noted([["trained", "seeds", *raised, "R2 of the sink"], *body], [])


def swap_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Of every row that was swapped: what its layers cost together and alone, each answer once."""
    from studies.compare import swapped  # imports matplotlib, which other blocks do not

    body = []
    for row, own in swapped.swapped(name, records, seeds).items():
        whole, put, back = own.whole, own.changes("in"), own.changes("back")
        cells = [f"{each:+.2f}" for each in (whole, put.sum(), back.sum())]
        cells += [_largest(put), _largest(-back)]
        ranks = [own.with_after(word) for word in ("in", "back")]
        cells += ["" if rank is None else f"{rank:.2f}" for rank in ranks]
        body.append([row, str(own.section["chats"]), *cells])
    header = ["tuned", "chats", "nats a token over the model's", "sum of each layer put in"]
    header += ["sum of each put back", "dearest put in", "best put back"]
    header += [
        f"rank of DP-after with {each}, at equal depth" for each in ("cost put in", "saving")
    ]
    return noted([header, *body], [])


def _largest(values: Any, count: int = 3) -> str:
    """The layers of the largest values, and these."""
    order = sorted(range(len(values)), key=lambda each: -values[each])[:count]
    return ", ".join(f"{each} ({values[each]:.2f})" for each in order)


def shift_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Of every run whose sink was exchanged: where attention goes, and what of the loss that is."""
    table = [["", "chats", *(f"{said}: {', '.join(EXCHANGED)}" for said in SHARES.values())]]
    table[0] += [f"{said}{how}" for how in ("", ", each answer once") for said in SHIFTED.values()]
    table[0] += ["largest gap of a head, in and back", "left row by row, in and back"]
    for run, own in shifted(name, records, seeds).items():
        cells = [run, str(own["chats"])]
        for share in SHARES:
            cells.append(", ".join(f"{own['readings'][each][share]:.1f}" for each in EXCHANGED))
        by_answer = {word: told["by_answer"] for word, told in own["changes"].items()}
        cells += [_lost(told[word]) for told in (own["changes"], by_answer) for word in SHIFTED]
        done = [own["exchanges"][word] for word in ("in", "back")]
        cells.append(", ".join(f"{each['gap']:.1f}" for each in done))
        cells.append(", ".join(f"{each['by_row']:.0f} %" for each in done))
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
    "back": "back: the encoder with the model's shares, over the encoder",
    "back elsewhere": "those shifts on other heads",
}


def _lost(change: Mapping[str, Any]) -> str:
    """Nats a token, and the part of the whole where there is one."""
    said = "{:+.2f} ({:+.2f} to {:+.2f})".format(change["change"], *change["interval"])
    return "; ".join(filter(None, (said, part_of_whole(change))))


def questions_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """What each row changes of the base's tasks, and Bitune of its second causal set's."""
    tables = []
    for kind, said in (("again", "read causally"), ("bitune", "variant")):
        against, found = paired.questions(kind, name, records, seeds)
        tasks = list(dict.fromkeys(task for cells in found.values() for task in cells))
        body = [
            [row, *(str(cells[task] or "") for task in tasks)]
            for row, cells in sorted(found.items())
        ]
        header = [said, *(f"{task}, minus {against}'s" for task in tasks)]
        tables.append(noted([header, *body], []))
    return "\n\n".join(filter(None, tables))


def equal_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Each row against the rows of the other mask that embed at least as well."""
    body = [
        [each.row, f"{each.sts:.2f}", each.other or "none", sts, str(each.ratio or "")]
        for each in sorted(paired.matches(name, records, seeds), key=lambda each: each.row)
        for sts in ["" if each.other_sts is None else f"{each.other_sts:.2f}"]
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
    """Tuned both ways against causally, over pairs of runs: their mean, and at equal STS."""
    from studies.compare import runs  # imports matplotlib, which other blocks do not

    kinds = runs.pairs(name, records, seeds)
    found = [each.cells for own in kinds.values() for each in own]
    columns = {runs.GAP: "STS minus its"} | _differences("its", found)
    lengths = [each for cells in found for each in cells if paired.BY_LENGTH in each]
    columns |= {each: f"{each}, over its" for each in lengths}
    columns |= _head_columns(found, ", minus its") | _tasks("its", found)
    if not kinds:
        return ""
    table = [["tuned both ways against its causal twin", *columns.values()]]
    for kind, own in kinds.items():
        for equal in (False, True):
            means = [_over(runs.over_runs(own, each, equal), len(own)) for each in columns]
            said = "at equal STS" if equal else f"{kind}, {len(own)} pairs of runs"
            table += [[said, *means]] if any(means) else []
    transposed = [list(measure) for measure in zip(*table, strict=True) if any(measure[1:])]
    return noted(transposed, [])


def runs_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Of every kind of run, by its mask: what tuning changes of the base, over runs."""
    from studies.compare import runs  # imports matplotlib, which other blocks do not

    kinds = runs.changes(name, records, seeds)
    found = [each.cells for own in kinds.values() for each in own]
    columns = _differences("the base's", found)
    columns |= _head_columns(found) | _tasks("the base's", found)
    body = [
        [kind, str(len(own)), *(_over(runs.over_runs(own, column), len(own)) for column in columns)]
        for kind, own in kinds.items()
    ]
    body = [row for row in body if any(row[2:])]
    return noted([["tuned", "runs", *columns.values()], *body], [])


def _head_columns(found: Iterable[Mapping[str, Any]], against: str = "") -> dict[str, str]:
    """The columns of what single heads do, as tables call them; they are changes of the base."""
    told = {column for cells in found for column in cells}
    return {each: f"{said}{against}" for each, said in HEADS.items() if each in told}


def _tasks(whose: str, found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of generation tasks, as tables call them."""
    told = [column for cells in found for column in cells if column.endswith(paired.ASKED)]
    return {each: f"{each.removesuffix(paired.ASKED)} minus {whose}" for each in told}


def _over(found: Any, every: int) -> str:
    """A mean over runs, and of how many where not all of them tell it."""
    if found is None:
        return ""
    return f"{found}, n = {found.runs}" if found.runs < every else str(found)


def claim_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Correlations of lost generation, over all rows, over those of one mask, and over seeds."""
    from studies.compare import claim  # imports matplotlib, which other blocks do not

    def cell(own: list[claim.Tuned], cause: str, by_answer: bool = False) -> str:
        if len({each.settings for each in own}) < 3:
            return ""
        return str(claim.correlation(own, cause, by_answer))

    found = claim.tuned(name, records, seeds)
    body = []
    for cause, label in claim.CAUSES.items():
        known = [each for each in found if cause in each.causes]
        told = [each for each in known if each.by_answer is not None]
        masks = [[each for each in known if each.is_control is causal] for causal in (False, True)]
        cells = [*(cell(own, cause) for own in (known, *masks)), cell(told, cause, by_answer=True)]
        cells += [cell(claim.of_equal_steps(known), cause)]
        cells.append(str(claim.over_seeds(known, cause) or ""))
        body += [[label, *cells]] if known else []
    header = ["lost generation goes along with", "all rows", "tuned both ways", "tuned causally"]
    header += ["all rows, each answer once", "rows of equal steps"]
    header += ["over the seeds of a row, all rows as one"]
    return noted([header, *body], [])
