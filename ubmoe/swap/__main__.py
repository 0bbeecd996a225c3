"""Which layers' tuning costs the language model? Swap one layer at a time, and read causally.

python -m ubmoe.swap configs/tiny.yaml ubmoe.bi=runs/tiny/bi
"""

import sys
from pathlib import Path

try:
    from ubmoe import cli
    from ubmoe.config import Config
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)


def main(config: Config) -> Path | None:
    """Perplexity of every swap between the model and its tuned encoder. Returns the result."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    cli.in_one_process("swap")
    with recording("swap", "swap", config, "swap.png") as run:
        from ubmoe.data.rows import spaced
        from ubmoe.evaluate.generation import held_out_chats
        from ubmoe.models.digests import fingerprint
        from ubmoe.models.loading import load_tokenizer, load_with_encoder, within_context
        from ubmoe.report import figures
        from ubmoe.swap.swaps import swap

        config = within_context(config, "ubmoe")
        every = held_out_chats(config, load_tokenizer(config.model))
        chats = spaced(every, config.swap.max_chats)
        run.model, encoder = load_with_encoder(config)
        run.section = swap(run.model, encoder, chats, config, run.directory)
        run.section["bi_weights"] = fingerprint(encoder)
        run.figures = figures.swap(run.section)
    return run.path


LOWER = "swap.batch_tokens"

if __name__ == "__main__":
    cli.run("python -m ubmoe.swap", __doc__ or "", main, lower=LOWER)
