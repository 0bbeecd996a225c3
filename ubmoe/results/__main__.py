"""Tables of a run and of the paper; plan, run and draw the study; records; downloads.

python -m ubmoe.results table configs/tiny.yaml
python -m ubmoe.results plan configs/qwen1.5-0.5b.yaml results.table=2
"""

import sys
from pathlib import Path

try:
    from ubmoe import cli
    from ubmoe.config import Config
    from ubmoe.report.tables import TEXT
    from ubmoe.results import paper, plan
    from ubmoe.results.pages import renew
    from ubmoe.results.records import existing, read_result, record, recorded
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)


def table(config: Config) -> str:
    """A table of the paper from the records; without results.table, what output_dir holds."""
    if config.results.table is not None:
        return paper.text(config.results.table, config, recorded(config))
    parts = [TEXT[path.stem](read_result(path)) for path in existing(config)]
    figures = sorted(str(path) for path in Path(config.output_dir).glob("*.png"))
    return "\n\n".join([*parts, "\n".join(["figures:", *(f"  {path}" for path in figures)])])


def figure(config: Config) -> str:
    """The study's pictures from the records; returns their paths."""
    from ubmoe.results import tradeoff  # imports matplotlib, which the other verbs do not

    return tradeoff.draw(config, recorded(config))


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
    "readme": renew,
    "prefetch": prefetch,
}

if __name__ == "__main__":
    cli.run("python -m ubmoe.results", __doc__ or "", VERBS)
