"""Tables of a run and of the paper; plan, run and draw the study; records; downloads.

python -m ubmoe.results table configs/tiny.yaml
python -m ubmoe.results plan configs/qwen1.5-0.5b.yaml results.table=2
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from ubmoe import cli
from ubmoe.config import Config, UserError
from ubmoe.results import plan
from ubmoe.results.records import ROOT, as_it_ran, as_text, existing, pack, read_result, record


def in_checkout() -> bool:
    """Whether studies/compare lies beside the package."""
    return (ROOT / "studies" / "compare").is_dir()


def comparing(module: str) -> Any:
    """A module of studies/compare, which lies beside the package and is not installed.

    By its name and only now: the package never imports the studies. Raises UserError.
    """
    if not in_checkout():
        raise UserError(
            f"{ROOT / 'studies'}: not there; expected a checkout of the repository, whose studies/ "
            "compares records: the package alone plans, runs, records and shows one run's results"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"studies.compare.{module}")


def recorded(config: Config) -> Any:
    """Every record of `results.directory`."""
    return comparing("records").recorded(config)


def table(config: Config) -> str:
    """A table of the paper from the records; without results.table, what output_dir holds.

    In a checkout recorded runs with the same settings stand beside it.
    """
    if config.results.table is not None:
        return str(comparing("paper").table(config))
    results = {path: read_result(path) for path in existing(config)}
    parts = [as_text(path, path.stem, result) for path, result in results.items()]
    if in_checkout():
        own = {path.stem: as_it_ran(result) for path, result in results.items()}
        parts += filter(None, [comparing("beside").text(own, recorded(config))])
    figures = sorted(str(path) for path in Path(config.output_dir).glob("*.png"))
    return "\n\n".join([*parts, "\n".join(["figures:", *(f"  {path}" for path in figures)])])


def figure(config: Config) -> str:
    """The study's pictures from the records; returns their paths."""
    return comparing("tradeoff").draw(config, recorded(config))


def readme(config: Config) -> str:
    """The generated tables of every page from the records; returns the pages' paths."""
    return comparing("pages").renew(config)


def prefetch(config: Config) -> str:
    """Download what the config names."""
    from ubmoe import prefetch  # imports torch, as the other verbs do not

    return prefetch.run(config)


VERBS = {
    "plan": plan.plan,
    "run": plan.run,
    "table": table,
    "figure": figure,
    "record": record,
    "pack": pack,
    "readme": readme,
    "prefetch": prefetch,
}

if __name__ == "__main__":
    cli.run("python -m ubmoe.results", __doc__ or "", VERBS)
