"""The stages of bidirectional fine-tuning, one after the other, by their objectives."""

from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.config import Config, StageSection
from ubmoe.data.chats import Chat
from ubmoe.encoder import contrastive, mntp
from ubmoe.encoder.language_loss import read_language
from ubmoe.training.allocator import return_freed_memory
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.trainer import check_enough_rows


class Data(NamedTuple):
    """A stage's training data: rows, the chats of a language-model loss, and rows left out."""

    rows: Any
    language: list[Chat]
    below: int = 0


def read_data(stage: StageSection, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Raises UserError, before any model is loaded."""
    if stage.objective == "mntp":
        return Data(mntp.chunked(stage, tokenizer), [])
    rows, below = contrastive.read_dataset(stage, tokenizer)
    return Data(rows, read_language(stage, tokenizer), below)


def train_stages(
    config: Config,
    data: list[Data],
    encoder: SentenceTransformer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scoring: contrastive.Scoring | None = None,
) -> list[dict[str, Any]]:
    """Train `model`, the encoder's inner model with its head, in place; a report for each stage.

    scoring: makes the callback of each contrastive stage that scores the encoder on its way. Raises
    UserError, before anything is written, for a stage whose rows make no batch.
    """
    for number, (stage, given) in enumerate(zip(config.bi.stages, data, strict=True)):
        if stage.max_steps != 0:
            check_enough_rows(len(given.rows), stage, f"bi.stages.{number}.dataset")
    reports: list[dict[str, Any]] = []
    for number, (stage, given) in enumerate(zip(config.bi.stages, data, strict=True)):
        rows, language, below = given
        if stage.max_steps == 0:  # transformers would take it for no limit
            reports.append({"objective": stage.objective, "rows": len(rows), "log": []})
            continue
        stage_run = StageRun(
            directory=Path(config.output_dir) / "stages" / str(number),
            seed=config.seed,
            resume=config.resume == "auto",
            before=config.bi.stages[:number],
            given=config.bi.model_dump(exclude={"stages", "whiten"}),
            distributed=config.distributed,
        )
        if stage.objective == "mntp":
            report = mntp.train_stage(model, tokenizer, stage, rows, stage_run)
        else:
            report = contrastive.train_stage(
                encoder, model, stage, rows, stage_run, language, below, scoring
            )
        reports.append({"objective": stage.objective} | report)
        return_freed_memory()
    return reports
