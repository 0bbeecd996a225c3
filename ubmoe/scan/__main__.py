"""Which layers may look both ways? Score every pattern of them, with no training at all.

python -m ubmoe.scan configs/tiny.yaml
python -m ubmoe.scan configs/qwen2.5-0.5b.yaml scan.pairs=path/to/STSB-dev.tsv
"""

import sys
from pathlib import Path

try:
    from ubmoe import cli
    from ubmoe.config import Config
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)


def main(config: Config) -> Path | None:
    """Score every pattern of layers on the same pairs. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    cli.in_one_process("scan")
    with recording("scan", "scan", config, "scan.png") as run:
        from ubmoe.evaluate.sts import sts_tasks
        from ubmoe.models.loading import load_model, within_context
        from ubmoe.report import figures
        from ubmoe.scan.scores import scan

        [task] = sts_tasks([config.scan.pairs])
        config = within_context(config, "bi")
        run.model = load_model(config.model)
        run.section = scan(run.model, config, task, run.directory)
        run.figures = figures.scan(run.section)
    return run.path


LOWER = "scan.batch_tokens"

if __name__ == "__main__":
    cli.run("python -m ubmoe.scan", __doc__ or "", main, lower=LOWER)
