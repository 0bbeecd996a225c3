"""What a program says when it ends: its scores, rounded, with their units, and what it wrote.

Nothing heavy is imported: only the result is read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

UNITS = {"metric": "cosine_spearman", "unit": "Spearman x 100"}  # of an `sts` section


def scores(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each score of a result that is called so; none for a result without one."""
    section = result.get(name) or {}
    if name in ("sts", "evaluation"):
        yield from _similarity("STS", section)
    if name == "dependence" and "overall" in section:
        shares = section["overall"]
        said = ", ".join(f"{share} {shares[share]:.1f}" for share in ("main", "before", "after"))
        yield f"attention dependence: {said} (% of attention)"
    yield from _generation(section)
    if name != "generation":  # what another program measures beside its own
        yield from _generation(result.get("generation") or {})
        return
    for row in result.get("sts") or ():
        yield from _similarity(f"STS, {row['route']}, {row['attention']}", row)


def _similarity(what: str, section: Mapping[str, Any]) -> Iterator[str]:
    if section.get("average") is not None:
        count = len(section["tasks"])
        yield f"{what}: {section['average']:.1f} ({UNITS['unit']}, {_counted(count)})"


def _generation(section: Mapping[str, Any]) -> Iterator[str]:
    if "metrics" in section and section.get("average") is not None:
        yield f"generation: {section['average']:.1f} % ({_counted(len(section['metrics']))})"
    if section.get("perplexity") is not None:
        yield f"perplexity of held-out answers: {_each(section['perplexity'])}"


def _each(values: float | Mapping[str, float]) -> str:
    """One number, or one for each model by its name."""
    if isinstance(values, Mapping):
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    return f"{values:.2f}"


def _counted(tasks: int) -> str:
    return "one task" if tasks == 1 else f"mean of {tasks} tasks"


def written(directory: Path, names: list[str]) -> str:
    """Every folder and file that a run left, in a line."""
    there = [
        f"{name}/" if (directory / name).is_dir() else name
        for name in names
        if (directory / name).exists()
    ]
    return f"wrote in {directory}: {', '.join(there)}"
