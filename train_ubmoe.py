"""Join a model's original and bidirectionally tuned FFNs, train the routers, and score both uses.

python train_ubmoe.py configs/tiny.yaml
python train_ubmoe.py configs/qwen2.5-0.5b.yaml ubmoe.bi=runs/qwen2.5-0.5b/bi ubmoe.top_k=2
torchrun --nproc-per-node 8 train_ubmoe.py configs/qwen2.5-7b.yaml
"""

import shutil
from pathlib import Path

from ubmoe import cli
from ubmoe.config import Config


def main(config: Config) -> Path:
    """Join uni and bi, train the routers, save, score. Returns the result's path."""
    # torch is imported late, so that --help and a mistyped key are answered at once.
    from ubmoe.recording import recording

    models = ["ubmoe" if form == "mixture" else form for form in config.ubmoe.export]
    with recording(
        "train_ubmoe", "generation", config, "routing.png", *models, working=["routers"]
    ) as run:
        from ubmoe.models.loading import best_device
        from ubmoe.models.source import ModelSource
        from ubmoe.moe import pipeline
        from ubmoe.moe.joining import save_routers
        from ubmoe.report import figures

        source = ModelSource.of(config.model)
        config = source.within_context(config, "ubmoe")
        inputs = pipeline.read(config, source)
        best_device(config.model.device)  # where the processes meet, before one is asked which
        joined = pipeline.join(config, inputs, run.place) if run.is_main else {}
        run.model = model = pipeline.load(inputs, run.place)
        router = pipeline.train(config, inputs, model)
        if run.is_main:
            if "mixture" in config.ubmoe.export:
                save_routers(model, run.place("ubmoe"))
            elif inputs.joins:
                shutil.rmtree(run.place("ubmoe"))
            scores = pipeline.generation_of(config, inputs, model)
            run.section = scores | {"bi_weights": joined.pop("bi_weights")}
            run.more |= joined
            run.more["sts"] = pipeline.sts_of(config, inputs, model, run)
            record = {"generation": run.section, "sts": run.more["sts"]}
            pipeline.complete_cards(config, inputs, run.place, record)
            if router:
                run.section["router"] = router
                run.figures = figures.routing(router["log"], router["bi_weight_by_role"])
    return run.path


def dry_run(config: Config) -> str:
    """The dry run of `main`: parameters, steps, memory and files."""
    from ubmoe.dry_run import programs

    return programs.train_ubmoe(config)


LOWER = "ubmoe.per_device_train_batch_size, ubmoe.max_tokens or evaluation.batch_size"

if __name__ == "__main__":
    cli.run("train_ubmoe.py", __doc__ or "", main, dry_run, LOWER)
