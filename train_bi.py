"""Tune chosen modules of a causal language model into a sentence encoder, and score it.

python train_bi.py configs/tiny.yaml
python train_bi.py configs/qwen2.5-0.5b.yaml 'bi.stages.0.train=[attention]'
torchrun --nproc-per-node 8 train_bi.py configs/qwen2.5-7b.yaml
"""

import sys
from pathlib import Path

try:
    from ubmoe import cli
    from ubmoe.config import Config
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)


def main(config: Config) -> Path:
    """Load the model, train its stages, save the encoder, score it. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    made, stages = ("bi", "training.png"), [f"stages/{n}" for n in range(len(config.bi.stages))]
    with recording("train_bi", "sts", config, *made, working=stages) as run:
        from ubmoe.encoder import card, whitening
        from ubmoe.encoder.sentence_encoder import (
            as_encoder,
            check_mask,
            rendered,
            save_encoder,
        )
        from ubmoe.encoder.stages import read_data, train_stages
        from ubmoe.evaluate.sts import sts_scores, sts_tasks
        from ubmoe.evaluate.trajectory import Trajectory, parted
        from ubmoe.models.loading import load_model, load_tokenizer, within_context
        from ubmoe.report import figures, tables

        config = within_context(config, "bi", "trajectory")
        tokenizer = load_tokenizer(config.model)
        data = [read_data(stage, tokenizer) for stage in config.bi.stages]
        unlabelled = whitening.read_sentences(config.bi.whiten, tokenizer)
        if not config.bi.stages:  # nothing is trained under the mask: it is the adapter's
            check_mask(config)
        tasks = sts_tasks(config.evaluation.sts)
        trajectory = Trajectory(config, tokenizer) if config.trajectory.steps else None
        model = load_model(config.model, *config.bi.mask)
        encoder = as_encoder(model, tokenizer, config.bi)
        whitening.check(config.bi.whiten, len(unlabelled), encoder.get_embedding_dimension() or 0)
        run.log("one text, as the model reads it: %s", rendered(encoder, "A small example."))
        scoring = trajectory.callback if trajectory else None
        reports = train_stages(config, data, encoder, model, tokenizer, scoring)
        parts = parted(reports)
        run.model = model
        if run.is_main:
            whitened = whitening.whiten(encoder, config, unlabelled)
            save_encoder(encoder, model, tokenizer, config.bi, run.place("bi"))
            scores = sts_scores(
                encoder, tasks, config.evaluation.batch_size, config.evaluation.bf16
            )
            card.complete(run.place("bi"), config, scores)
            run.section = scores | parts
            if whitened is not None:
                run.section["whiten"] = whitened
            if tables.has_collapsed(reports):
                run.log(
                    "collapsed: all texts are alike to this encoder; try bi.stages.N.warmup_steps"
                )
            run.figures = figures.training(parts["stages"])
            run.figures |= figures.trajectory(parts.get("trajectory", []))
    return run.path


def dry_run(config: Config) -> str:
    """What `main` would do: parameters, steps, memory and files."""
    from ubmoe.dry_run import programs

    return programs.train_bi(config)


LOWER = "bi.stages.N.mini_batch_tokens (with bi.stages.N.cached=true)"

if __name__ == "__main__":
    cli.run("train_bi.py", __doc__ or "", main, dry_run, LOWER)
