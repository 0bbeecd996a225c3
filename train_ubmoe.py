"""Join a model's original and bidirectionally tuned FFNs, train the routers, and score both uses.

python train_ubmoe.py configs/tiny.yaml
python train_ubmoe.py configs/qwen2.5-0.5b.yaml ubmoe.bi=runs/qwen2.5-0.5b/bi ubmoe.top_k=2
torchrun --nproc-per-node 8 train_ubmoe.py configs/qwen2.5-7b.yaml
"""

import sys
from pathlib import Path

try:
    from ubmoe import cli
    from ubmoe.config import Config
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)


def main(config: Config) -> Path:
    """Load uni and bi, join them, train, save, score. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    with recording("train_ubmoe", "generation", config) as run:
        from ubmoe.models.digests import fingerprint
        from ubmoe.models.loading import within_context
        from ubmoe.moe import export, pipeline
        from ubmoe.moe.joining import join
        from ubmoe.report import figures

        config = within_context(config, "ubmoe")
        inputs = pipeline.read(config)
        tokenizer, encoder = inputs.tokenizer, inputs.encoder
        uni, bi = pipeline.load(config, inputs)
        model = join(uni, bi, config.ubmoe.top_k)
        made = pipeline.made(config, inputs, routed=False)
        if run.is_main and "modes" in config.ubmoe.export:
            export.save_modes(uni, bi, tokenizer, encoder, run.place("modes"), made)
        if run.is_main and "adapter" in config.ubmoe.export:
            run.more["adapter"] = export.save_adapter(
                uni, bi, tokenizer, encoder, run.place("adapter"), made, config.ubmoe.rank
            )
        bi_weights = fingerprint(bi)
        del uni, bi  # the mixture holds both
        router = pipeline.train(config, inputs, model)
        run.model = model
        if run.is_main:
            if "mixture" in config.ubmoe.export:
                made = pipeline.made(config, inputs, routed=True)
                export.save_mixture(model, tokenizer, encoder, run.place("ubmoe"), made)
            scores = pipeline.generation_of(config, inputs, model)
            run.section = scores | {"router": router, "bi_weights": bi_weights}
            run.more["sts"] = pipeline.sts_of(config, inputs, model, run.place("adapter"))
            run.figures = figures.routing(router["log"], router["bi_weight_by_role"])
    return run.path


def dry_run(config: Config) -> str:
    """What `main` would do: parameters, steps, memory and files."""
    from ubmoe.dry_run import programs

    return programs.train_ubmoe(config)


LOWER = "ubmoe.per_device_train_batch_size, ubmoe.max_tokens or evaluation.batch_size"

if __name__ == "__main__":
    cli.run("train_ubmoe.py", __doc__ or "", main, dry_run, LOWER)
