"""Word-level probing: the word vectors of several models on the tasks of Feng et al.

python -m ubmoe.probing configs/tiny.yaml
python -m ubmoe.probing configs/tiny.yaml probing.data=path/to/semantic-probing-2025
"""

from pathlib import Path

from ubmoe import cli
from ubmoe.config import Config


def main(config: Config) -> Path | None:
    """Extract word vectors of every model once, probe them, compare. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    cli.in_one_process("probing")
    made = ("probing_context.png", "probing_anisotropy.png")
    with recording("probing", "probing", config, *made, working=["vectors"]) as run:
        from ubmoe.probing import experiment
        from ubmoe.probing.tasks import read_tasks
        from ubmoe.report import figures

        tasks = read_tasks(config.probing.data, config.probing.tasks)
        models = experiment.models_by_label(config)
        reports = []
        for label, which in models.items():
            run.model = None  # before the next one is loaded
            source = experiment.source_of(config, which)
            run.model = experiment.loaded(source, which)
            kept = run.directory / "vectors"
            reports.append(experiment.probe(config, label, which, source, run.model, tasks, kept))
        run.section = {
            "tasks": experiment.described(tasks),
            "models": reports,
            "differences": experiment.differences(reports),
        }
        run.figures = figures.probing(run.section)
    return run.path


LOWER = "probing.batch_tokens"

if __name__ == "__main__":
    cli.run("python -m ubmoe.probing", __doc__ or "", main, lower=LOWER)
