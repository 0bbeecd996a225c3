"""Masked next token prediction (LLM2Vec): a masked token is predicted from the position before it.

Chunks of raw text, masks that are a function of (seed, epoch, row), transformers' Trainer. The
mask token is never added to the tokenizer, so it is not saved either.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.config import StageSection, UserError
from ubmoe.data.padding import IGNORE_INDEX
from ubmoe.data.tokens import check_ids, chunks_of, sentences_of
from ubmoe.models.digests import digest, digest_of_tokenizer, resume_key
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.losses import mean_loss, predictions
from ubmoe.training.modules import announce, tuning
from ubmoe.training.trainer import GuardedTrainer, run_trainer

log = logging.getLogger(__name__)


class Chunks(Dataset[dict[str, Tensor]]):
    """(epoch, row) -> (T,) tokens and labels, masked as this epoch masks this row."""

    def __init__(self, chunks: Tensor, settings: "Masking", seed: int) -> None:
        self.chunks, self.settings, self.seed = chunks, settings, seed

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        ids, labels = self.settings(
            self.chunks[place[1]], np.random.default_rng((self.seed, *place))
        )
        return {"input_ids": ids, "labels": labels}


class Places(Sampler[tuple[int, int]]):
    """(epoch, row) in an order of each epoch's own.

    The sampler yields the epoch because accelerate 1.15 sets it on every sampler, but on a data set
    neither after a resumption nor under DDP.
    """

    epoch = 0

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return ((self.epoch, int(row)) for row in order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Masking:
    """(T,) tokens -> the same with some masked, and labels that are IGNORE_INDEX elsewhere.

    Every ordinary token is chosen with `mlm_probability`. `bert`: of the chosen, 80 % become the
    mask token, 10 % a random one, 10 % stay; `all`: every one becomes the mask token.

    rows: the model's embeddings; random tokens are among them. Raises UserError for a mask token
    that is not one token.
    """

    def __init__(
        self, stage: StageSection, tokenizer: PreTrainedTokenizerBase, rows: int | None = None
    ) -> None:
        # alone, some tokenizers would put a text's first token before it
        known = tokenizer.get_vocab().get(stage.mask_token)
        apart = tokenizer(stage.mask_token, add_special_tokens=False)["input_ids"]
        ids = apart if known is None else [known]
        if len(ids) != 1:
            raise UserError(
                f"bi.stages.N.mask_token: {stage.mask_token!r} is {len(ids)} tokens of this "
                "tokenizer; expected one"
            )
        self.mask: int = ids[0]
        check_ids(tokenizer, ids, "bi.stages.N.mask_token")
        self.probability, self.style = stage.mlm_probability, stage.masking
        self.special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self.vocabulary = min(len(tokenizer), rows or len(tokenizer))

    def __call__(self, ids: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        tokens = ids.numpy().copy()
        chosen = generator.random(len(tokens)) < self.probability
        chosen &= ~np.isin(tokens, self.special)
        labels = np.where(chosen, tokens, IGNORE_INDEX)
        fate = generator.random(len(tokens))
        strangers = generator.integers(self.vocabulary, size=len(tokens))
        if self.style == "all":
            tokens[chosen] = self.mask
        else:
            tokens[chosen & (fate < 0.8)] = self.mask
            tokens = np.where(chosen & (fate >= 0.9), strangers, tokens)
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def chunked(stage: StageSection, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(rows, max_tokens): the texts, a line each, end to end and cut; the rest is dropped.

    Raises UserError where the texts do not fill one chunk.
    """
    texts = sentences_of(stage.dataset, tokenizer, stage.max_rows, blank=True)
    return torch.tensor(chunks_of(texts, tokenizer, stage.max_tokens, stage.dataset))


class MntpTrainer(GuardedTrainer):
    """Mean cross-entropy over the masked tokens of a batch, and the share that was right."""

    accuracy = 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Places:
        return Places(len(self.train_dataset), self.args.seed)  # type: ignore[arg-type]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        ids = {"input_ids": inputs["input_ids"]}
        logits, labels = predictions(model, head, ids, inputs["labels"])
        self.accuracy = (logits.argmax(-1) == labels).float().mean().item() if len(labels) else 0.0
        return mean_loss(logits, labels)

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        extra = {"masked_accuracy": self.accuracy} if "loss" in logs else {}
        super().log(logs | extra, *arguments)


def train_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: StageSection,
    chunks: Tensor,
    stage_run: StageRun,
) -> dict[str, Any]:
    """Train the stage's modules of `model` in place on (rows, T) chunks.

    Returns the stage's report: counts by module, rows, log.
    """
    embedding: Any = model.get_input_embeddings()
    data = Chunks(chunks, Masking(stage, tokenizer, len(embedding.weight)), stage_run.seed)
    key = resume_key(model) | {"data": digest([("chunks", chunks)])}
    with tuning(model, stage, stage_run) as counts:
        report = {"trainable": counts, "rows": len(chunks), "tokens": chunks.numel()}
        report["max_tokens"] = chunks.shape[1]
        announce(stage, model, report)
        history = run_trainer(
            partial(MntpTrainer, model),
            stage,
            stage_run,
            data,
            model.device,
            key=key | {"tokenizer": digest_of_tokenizer(tokenizer)},
            remove_unused_columns=False,
        )
    return report | {"log": history}
