"""Tune chosen modules of a causal language model into a sentence encoder, and score it.

python train_bi.py configs/tiny.yaml
python train_bi.py configs/qwen2.5-0.5b.yaml 'bi.stages.0.train=[attention]'
torchrun --nproc-per-node 8 train_bi.py configs/qwen2.5-7b.yaml
"""

from pathlib import Path

from ubmoe import cli
from ubmoe.config import Config


def main(config: Config) -> Path:
    """Load the model, train its stages, save the encoder, score it. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    made, stages = ("bi", "training.png"), [f"stages/{n}" for n in range(len(config.bi.stages))]
    with recording("train_bi", "sts", config, *made, working=stages) as run:
        from ubmoe.bidirectional import attention_name
        from ubmoe.encoder import card, whitening
        from ubmoe.encoder.sentence_encoder import (
            as_encoder,
            check_mask,
            rendered,
            save_encoder,
        )
        from ubmoe.encoder.stages import read_data, train_stages
        from ubmoe.evaluate.benchmark import check_instructions
        from ubmoe.evaluate.sts import sts_scores, sts_tasks
        from ubmoe.evaluate.trajectory import Trajectory, parted
        from ubmoe.models.loading import load_model
        from ubmoe.models.source import ModelSource
        from ubmoe.report import figures, tables

        source = ModelSource.of(config.model)
        config = source.within_context(config, "bi", "trajectory")
        tokenizer = source.tokenizer
        check_instructions(config.bi.instructions)
        data = [read_data(stage, tokenizer) for stage in config.bi.stages]
        unlabelled = whitening.read_sentences(config.bi.whiten, tokenizer)
        if not config.bi.stages:  # nothing is trained under the mask: it is the adapter's
            check_mask(config)
        tasks = sts_tasks(config.evaluation.sts)
        trajectory = Trajectory(config, tokenizer) if config.trajectory.steps else None
        model = load_model(source, *config.bi.mask)
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
            asked = config.evaluation
            scores = sts_scores(encoder, tasks, asked.batch_size, asked.bf16, run.partial())
            card.complete(run.place("bi"), config, scores)
            run.section = {"attention": attention_name(model.config)} | scores | parts
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
    """The dry run of `main`: parameters, steps, memory and files."""
    from ubmoe.dry_run import programs

    return programs.train_bi(config)


LOWER = "bi.stages.N.mini_batch_tokens (with bi.stages.N.cached=true)"

if __name__ == "__main__":
    cli.run("train_bi.py", __doc__ or "", main, dry_run, LOWER)
