"""The stages of bidirectional fine-tuning, one after the other, by their objectives."""

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.config import Config, StageSection
from ubmoe.encoder import contrastive, mntp
from ubmoe.training.checkpoints import Work


def read_data(stage: StageSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What the stage trains on. Raises UserError, before any model is loaded."""
    if stage.objective == "mntp":
        return mntp.chunked(stage, tokenizer)
    return contrastive.read_dataset(stage)


def train_stages(
    config: Config,
    data: list[Any],
    encoder: SentenceTransformer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Train `model`, the encoder's inner model with its head, in place; a report for each stage."""
    reports: list[dict[str, Any]] = []
    for number, (stage, rows) in enumerate(zip(config.bi.stages, data, strict=True)):
        if stage.max_steps == 0:  # transformers would take it for no limit
            reports.append({"objective": stage.objective, "rows": len(rows), "log": []})
            continue
        work = Work(
            directory=Path(config.output_dir) / "stages" / str(number),
            seed=config.seed,
            resume=config.resume == "auto",
            before=config.bi.stages[:number],
            given=config.bi.model_dump(exclude={"stages"})
            | config.model.model_dump(include={"revision", "dtype", "adapter"}),
        )
        if stage.objective == "mntp":
            report = mntp.train_stage(model, tokenizer, stage, rows, work)
        else:
            report = contrastive.train_stage(encoder, model, stage, rows, work)
        reports.append({"objective": stage.objective} | report)
    return reports
