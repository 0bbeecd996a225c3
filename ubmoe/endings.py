"""A program's last lines: its scores, rounded, with their units, and the files it wrote.

Nothing heavy is imported: only the result is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ubmoe.similarity import UNITS, sections

NAMED = ("route", "attention")  # of a mixture's similarity


def scores(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each score of a result that is called so; none for a result without one."""
    section = result.get(name) or {}
    if name in ("sts", "evaluation"):
        yield from _similarities(result)
    if name == "dependence" and "overall" in section:
        shares = section["overall"]
        said = ", ".join(f"{share} {shares[share]:.1f}" for share in ("main", "before", "after"))
        yield f"attention dependence: {said} (% of attention)"
    if name == "scan":
        yield from _scanned(section.get("patterns") or [])
    if name == "probing":
        yield from _probed(section.get("models") or [])
    if readings := section.get("readings"):  # of a shift
        lost = {reading: values["perplexity"] for reading, values in readings.items()}
        yield f"perplexity of held-out answers: {_number(lost)}"
    if benchmark := result.get("mteb"):
        count, types = len(benchmark["tasks"]), len(benchmark["types"])
        means = f"{_counted(count)}; of {types} types {benchmark['average_of_types']:.1f}"
        yield f"mteb: {benchmark['average']:.1f} (main scores x 100, {means})"
    yield from _generation(section)
    if name != "generation":  # what another program measures beside its own
        yield from _generation(result.get("generation") or {})
        return
    yield from _similarities(result)


def _similarities(result: Mapping[str, Any]) -> Iterator[str]:
    for section in sections(result):
        what = ", ".join(["STS", *(section[key] for key in NAMED if "route" in section)])
        if section.get("average") is not None:
            count = len(section["tasks"])
            yield f"{what}: {section['average']:.1f} ({UNITS['unit']}, {_counted(count)})"


def _scanned(patterns: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The best pattern, by whichever pooling; its vectors as they are, and not centred."""
    scored = [
        (values["score"], item["name"], name.replace("_", " "))
        for item in patterns
        for name, values in item.items()
        if isinstance(values, Mapping) and "score" in values
    ]
    if scored:
        score, layers, pooling = max(scored)
        yield f"STS, untrained: at best {score:.1f} ({UNITS['unit']}), layers {layers}, {pooling}"


def _probed(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each model's mean over its probes of classes, but for the controls."""
    means = []
    for model in models:
        rows = [item for item in model["rows"] if item["control"] == "none"]
        every = [item["balanced_accuracy"] for item in rows if "balanced_accuracy" in item]
        means += [f"{model['label']} {100 * fmean(every):.1f}"] if every else []
    if means:
        yield f"probes: {', '.join(means)} (balanced accuracy in %, mean of all)"


def _generation(section: Mapping[str, Any]) -> Iterator[str]:
    if "metrics" in section and section.get("average") is not None:
        yield f"generation: {section['average']:.1f} % ({_counted(len(section['metrics']))})"
    if section.get("perplexity") is not None:
        yield f"perplexity of held-out answers: {_number(section['perplexity'])}"


def _number(values: float | Mapping[str, float]) -> str:
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
