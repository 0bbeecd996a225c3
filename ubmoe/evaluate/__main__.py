"""Score a directory or hub id on STS tasks and, with evaluation.language_model=true, on generation.

python -m ubmoe.evaluate configs/tiny.yaml model.name=runs/tiny/bi
python -m ubmoe.evaluate model.name=runs/tiny/bi evaluation.sts=[] evaluation.mteb=[eng]
"""

from pathlib import Path

from ubmoe import cli
from ubmoe.config import Config


def main(config: Config) -> Path:
    """Load the encoder, score it, and the language model where asked. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    with recording("evaluate", "evaluation", config) as run:
        from ubmoe.encoder.sentence_encoder import load_encoder
        from ubmoe.evaluate.benchmark import check_instructions, mteb_scores, mteb_tasks
        from ubmoe.evaluate.generation import language_model_scores
        from ubmoe.evaluate.sts import sts_scores, sts_tasks
        from ubmoe.models.source import ModelSource

        asked = config.evaluation
        tasks, further = sts_tasks(asked.sts), mteb_tasks(asked.mteb)
        check_instructions(config.bi.instructions)
        source = ModelSource.of(config.model)
        if asked.language_model:
            run.more = {"generation": language_model_scores(config, source)}
        encoder = load_encoder(config, source)
        run.section = sts_scores(encoder, tasks, asked.batch_size, asked.bf16, run.partial())
        if further:
            run.more["mteb"] = mteb_scores(encoder, further, asked.batch_size, asked.bf16)
        run.model = encoder[0].model
    return run.path


LOWER = "evaluation.batch_size"

if __name__ == "__main__":
    cli.run("python -m ubmoe.evaluate", __doc__ or "", main, lower=LOWER)
