"""Tune a model to read its prompt twice, causally and in both directions, and score its answers.

python -m ubmoe.bitune configs/tiny.yaml
python -m ubmoe.bitune configs/qwen2.5-0.5b.yaml bitune.variant=lora
"""

from pathlib import Path

from ubmoe import cli
from ubmoe.config import Config


def main(config: Config) -> Path | None:
    """Load the model, train adapters and theta, save, score. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    made = ("bitune", "bitune.png")
    with recording("bitune", "bitune", config, *made, working=["adapters"]) as run:
        from ubmoe.bitune import model, saving, training
        from ubmoe.bitune.examples import read_examples
        from ubmoe.bitune.likelihoods import Likelihoods
        from ubmoe.data.rows import held_out
        from ubmoe.evaluate import generation
        from ubmoe.models.loading import load_model
        from ubmoe.models.source import ModelSource
        from ubmoe.report import figures
        from ubmoe.training.checkpoints import StageRun

        source = ModelSource.of(config.model)
        config = source.within_context(config, "bitune")
        settings = config.bitune
        scoring = config.evaluation.model_copy(update={"generation": settings.generation})
        generation.check_tasks(scoring.generation, scoring.data)
        tokenizer = source.tokenizer
        read = read_examples(
            settings.dataset, tokenizer, settings.template, settings.max_tokens, settings.max_rows
        )
        chats, apart = held_out(read.chats, settings.held_out, "bitune.held_out")
        examples, kept = ([example for chat in some for example in chat] for some in (chats, apart))
        counts = {"examples": len(examples), "held_out": len(kept), "dropped": read.dropped}
        run.log("%(examples)d examples, %(held_out)d held out, %(dropped)d dropped", counts)
        counts["max_tokens"] = settings.max_tokens
        bitune = model.attach(load_model(source), settings, config.seed)
        stage_run = StageRun(run.directory / "adapters", config.seed, config.resume == "auto")
        log = training.train(bitune, settings, examples, stage_run)
        run.model = bitune.decoder
        if run.is_main:
            saving.save(bitune, tokenizer, settings.template, run.place("bitune"))
            with generation.warned_once("lm_eval"):
                lm = Likelihoods(bitune, tokenizer, scoring.batch_size)
            scores = generation.generation_scores(bitune.decoder, tokenizer, scoring, lm)
            scores |= training.perplexity(bitune, kept, scoring.bf16)
            metadata = {"variant": settings.variant, "counts": counts}
            run.section = scores | metadata | training.alphas(bitune) | {"log": log}
            saving.write_card(run.place("bitune"), config, run.section)
            run.figures = figures.mixing(run.section)
    return run.path


def dry_run(config: Config) -> str:
    """The dry run of `main`: parameters, steps, memory and files."""
    from ubmoe.dry_run import programs

    return programs.bitune(config)


LOWER = "bitune.per_device_train_batch_size, bitune.max_tokens or evaluation.batch_size"

if __name__ == "__main__":
    cli.run("python -m ubmoe.bitune", __doc__ or "", main, dry_run, LOWER)
