"""The programs `python -m ubmoe.scan`, `ubmoe.swap` and `ubmoe.shift`: one body, three sections."""

from functools import partial
from pathlib import Path
from typing import Any

from ubmoe import cli
from ubmoe.config import Config, UserError

LOWER = {"scan": "scan.batch_tokens", "swap": "swap.batch_tokens", "shift": "ubmoe.max_tokens"}


def run(name: str, purpose: str) -> None:
    """The command line of the program."""
    cli.run(f"python -m ubmoe.{name}", purpose, partial(main, name), lower=LOWER[name])


def main(name: str, config: Config) -> Path | None:
    """Change the model as the program says, measure, and record. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    cli.in_one_process(name)
    with recording(name, name, config, f"{name}.png") as recorded:
        _scan(config, recorded) if name == "scan" else _with_encoder(name, config, recorded)
    return recorded.path


def _scan(config: Config, recorded: Any) -> None:
    from ubmoe.evaluate.benchmark import check_instructions
    from ubmoe.evaluate.sts import sts_tasks
    from ubmoe.interventions.scan import scan
    from ubmoe.models.loading import load_model
    from ubmoe.models.source import ModelSource
    from ubmoe.report import figures

    check_instructions(config.bi.instructions)
    task, *more = sts_tasks([config.scan.pairs])
    if more:
        raise UserError(f"scan.pairs: {config.scan.pairs} is several tasks; expected one of them")
    source = ModelSource.of(config.model)
    config = source.within_context(config, "bi")
    recorded.model = load_model(source)
    recorded.section = scan(recorded.model, source.tokenizer, config, task, recorded.directory)
    recorded.figures = figures.scan(recorded.section)


def _with_encoder(name: str, config: Config, recorded: Any) -> None:
    """Swap and shift exchange parts of the model and its tuned encoder, on held-out chats."""
    from ubmoe.data.rows import spaced
    from ubmoe.evaluate.generation import held_out_chats
    from ubmoe.interventions.shift import shift
    from ubmoe.interventions.swap import swap
    from ubmoe.models.digests import fingerprint
    from ubmoe.models.loading import load_with_encoder
    from ubmoe.models.source import ModelSource
    from ubmoe.report import figures
    from ubmoe.report.tables import model_of

    source = ModelSource.of(config.model)
    config = source.within_context(config, "ubmoe")
    every = held_out_chats(config, source.tokenizer)
    chats = spaced(every, getattr(config, name).max_chats)
    recorded.model, encoder = load_with_encoder(config, source)
    if name == "swap":
        recorded.section = swap(recorded.model, encoder, chats, config, recorded.directory)
        recorded.figures = figures.swap(recorded.section)
    else:
        recorded.section = shift(recorded.model, encoder, chats, config)
        label = model_of({"config": config.model_dump()})
        recorded.figures = {"shift.png": figures.shift({label: recorded.section})}
    recorded.section["bi_weights"] = fingerprint(encoder)
