"""Instruction tuning of a Bitune model on answers, and its perplexity on held-out ones."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ubmoe.bitune.model import Bitune
from ubmoe.config import BituneSection
from ubmoe.data.prompts import Example, batch
from ubmoe.evaluate.generation import perplexity_of
from ubmoe.models.digests import digest_of_frozen, digest_of_rows, resume_key
from ubmoe.models.precision import Setting, autocast
from ubmoe.training import losses
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.trainer import GuardedTrainer, check_enough_rows, run_trainer

log = logging.getLogger(__name__)


class LikeLengths(Sampler[int]):
    """Rows in an order of each epoch's own, in which those of a batch have like lengths."""

    epoch = 0

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class BituneTrainer(GuardedTrainer):
    """Batches of like lengths; the learned shares beside the loss."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengths:
        examples: Any = self.train_dataset
        size = self.args.train_batch_size * self.args.world_size
        return LikeLengths([len(example) for example in examples], size, self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        return losses.mean_loss(*model(**inputs))

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        bitune = self.accelerator.unwrap_model(self.model)
        super().log(logs | (alphas(bitune) if "loss" in logs else {}), *rest)


def alphas(bitune: Bitune) -> dict[str, Any]:
    """The second pass's learned share by layer, as `alpha_keys` and `alpha_values`; {} if none."""
    if not bitune.variant.mixed:
        return {}
    return {f"alpha_{what}": bitune.alpha(what).tolist() for what in ("keys", "values")}


def train(
    bitune: Bitune, settings: BituneSection, examples: list[Example], stage_run: StageRun
) -> list[dict[str, Any]]:
    """Train the adapters and theta in place; returns the log."""
    if settings.max_steps == 0:
        return []
    check_enough_rows(len(examples), settings, "bitune.dataset")
    trainable = sum(value.numel() for value in bitune.parameters() if value.requires_grad)
    log.info("%s: %d examples; %s parameters train", bitune.name, len(examples), f"{trainable:,}")
    history = run_trainer(
        partial(BituneTrainer, bitune, data_collator=batch),
        settings,
        stage_run,
        examples,
        bitune.decoder.device,
        key=resume_key(bitune.decoder, digest_of_frozen(bitune))
        | {"data": digest_of_rows((example.prompt, example.answer) for example in examples)},
        remove_unused_columns=False,
        label_names=["labels"],
    )
    bitune.eval()
    return history


def perplexity(bitune: Bitune, examples: list[Example], bf16: Setting = False) -> dict[str, Any]:
    """Perplexity of the answers' tokens, end tokens included: `generation.perplexity_of`."""

    def predicted(chosen: list[int]) -> tuple[Tensor, Tensor]:
        inputs = batch([examples[index] for index in chosen])
        device = bitune.decoder.device
        return bitune(**{name: value.to(device) for name, value in inputs.items()})

    texts = [example.prompt + example.answer for example in examples]
    tokens = [len(example.answer) for example in examples]
    head = bitune.decoder.get_output_embeddings()
    with torch.no_grad(), autocast(bf16, bitune.decoder.device):
        return perplexity_of(predicted, texts, tokens, head)
