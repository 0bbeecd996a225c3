"""Is it the sink's fall that costs the language model? Exchange the first token's share alone.

python -m ubmoe.shift configs/tiny.yaml ubmoe.bi=runs/tiny/bi
"""

import sys
from pathlib import Path

try:
    from ubmoe import cli
    from ubmoe.config import Config
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)


def main(config: Config) -> Path | None:
    """Perplexity of the model and its encoder, with each other's sinks. Returns the result."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    cli.in_one_process("shift")
    with recording("shift", "shift", config, "shift.png") as run:
        from ubmoe.data.rows import spaced
        from ubmoe.evaluate.generation import held_out_chats
        from ubmoe.models.digests import fingerprint
        from ubmoe.models.loading import load_tokenizer, load_with_encoder, within_context
        from ubmoe.report import figures
        from ubmoe.report.tables import model_of
        from ubmoe.shift.shifts import shift

        config = within_context(config, "ubmoe")
        every = held_out_chats(config, load_tokenizer(config.model))
        run.model, encoder = load_with_encoder(config)
        run.section = shift(run.model, encoder, spaced(every, config.shift.max_chats), config)
        run.section["bi_weights"] = fingerprint(encoder)
        label = model_of({"config": config.model_dump()})
        run.figures = {"shift.png": figures.shift({label: run.section})}
    return run.path


LOWER = "ubmoe.max_tokens"

if __name__ == "__main__":
    cli.run("python -m ubmoe.shift", __doc__ or "", main, lower=LOWER)
