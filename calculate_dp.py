"""Measure the attention dependence of a model on chats or texts: dependence.json, figures, a table.

python calculate_dp.py configs/tiny.yaml
python calculate_dp.py configs/qwen2.5-0.5b.yaml dependence.max_texts=200
torchrun --nproc-per-node 8 calculate_dp.py configs/qwen2.5-7b.yaml
"""

import time
from pathlib import Path

from ubmoe import cli
from ubmoe.config import Config


def main(config: Config) -> Path:
    """Read the texts, load the model, measure, and record. Returns the path of the result."""
    # torch is imported late, so that --help, a mistyped key and a bad row are answered at once.
    from ubmoe.data.rows import read_texts
    from ubmoe.recording import recording

    made = [f"dependence_{what}.png" for what in ("buckets", "heads", "map")]
    with recording("calculate_dp", "dependence", config, *made) as run:
        texts = read_texts(config.dependence.dataset, config.dependence.max_texts)

        from ubmoe.dependence.measure import measure
        from ubmoe.dependence.norms import norms
        from ubmoe.dependence.recorder import mean_attention
        from ubmoe.dependence.texts import cut, tokenize
        from ubmoe.models.loading import load_model
        from ubmoe.models.source import ModelSource
        from ubmoe.report import figures

        source = ModelSource.of(config.model)
        tokenizer = source.tokenizer
        config = source.within_context(config, "dependence")
        ids = tokenize(tokenizer, texts, config.dependence.chat_template)
        bidirectional = config.dependence.flow == "bidirectional"
        mask = config.bi.mask if bidirectional and config.bi.bidirectional else (bidirectional,)
        model = load_model(source, *mask)
        ids, truncated = cut(model, ids, config.dependence.max_tokens)
        resume, began = config.resume == "auto", time.monotonic()
        section = measure(model, ids, config.dependence, run.directory, resume)
        run.model = model
        seconds = round(time.monotonic() - began, 3)  # the run's has the loading, too
        section["norms"] = norms(model, ids, config.dependence.bf16)
        used = {"max_tokens": config.dependence.max_tokens, "truncated": truncated}
        run.section = section | used | {"seconds": seconds}
        shortest = min(ids, key=len)
        attention = mean_attention(model, shortest).numpy()
        tokens = [str(tokenizer.decode([token])) for token in shortest[: len(attention)]]
        run.figures = figures.dependence(section) | figures.attention_map(attention, tokens)
    return run.path


def dry_run(config: Config) -> str:
    """The dry run of `main`: parameters, steps, memory and files."""
    from ubmoe.dry_run import programs

    return programs.calculate_dp(config)


LOWER = "dependence.batch_tokens or dependence.max_tokens"

if __name__ == "__main__":
    cli.run("calculate_dp.py", __doc__ or "", main, dry_run, LOWER)
