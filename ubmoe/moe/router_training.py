"""Router training: ordinary chat fine-tuning with everything but the routers frozen.

Causal mask, loss on the assistant's tokens only. What is watched is the weight that the routers
give to the bi expert, and how undecided they are.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from ubmoe.config import MoeSection, UserError
from ubmoe.data.chats import Chat, collate
from ubmoe.models.digests import digest_of_frozen, digest_of_rows, resume_key
from ubmoe.models.precision import uses_bfloat16
from ubmoe.moe import routers, routes
from ubmoe.moe.distillation import Distillation
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.losses import mean_loss, predictions
from ubmoe.training.sharding import sharding
from ubmoe.training.trainer import GuardedTrainer, check_enough_rows, run_trainer

log = logging.getLogger(__name__)


class _Watch:
    """Mean weight of bi and mean entropy of the routers over the real tokens of a batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.real: Tensor | None = None
        layers = len(routes.blocks(model))
        self.seen = torch.zeros(layers, 2)  # of each: the weight of bi, and the entropy
        self.keep, self.logits = False, [torch.empty(0)] * layers
        self.off = False

    def see(self, layer: int, logits: Tensor) -> None:
        if self.off:
            return
        if self.keep:
            self.logits[layer] = logits
        probabilities = logits.detach().float().softmax(-1)
        entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)
        both = torch.stack((probabilities[:, routes.BI], entropy))  # (2, tokens)
        real = torch.ones_like(entropy) if self.real is None else self.real.flatten().to(both)
        self.seen = self.seen.to(both.device)
        self.seen[layer] = (both * real).sum(-1) / real.sum()

    def metrics(self) -> dict[str, Any]:
        bi, entropy = self.seen.T.tolist()
        return {
            "bi_weight": sum(bi) / len(bi),
            "router_entropy": sum(entropy) / len(entropy),
            "bi_weight_by_layer": bi,
        }


@contextmanager
def _watching(model: PreTrainedModel) -> Iterator[_Watch]:
    watch = _Watch(model)
    hooks = [
        block.gate.register_forward_hook(
            lambda _, __, output, layer=layer: watch.see(layer, output[0])
        )
        for layer, block in enumerate(routes.blocks(model))
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class RouterTrainer(GuardedTrainer):
    """Loss on answers, and on the distance from the encoder's vectors where these are asked for."""

    distance = torch.zeros(())

    def __init__(
        self,
        model: PreTrainedModel,
        settings: MoeSection,
        watch: _Watch,
        distillation: Distillation | None,
        **keys: Any,
    ) -> None:
        super().__init__(model, **keys)
        self.watch, self.distillation = watch, distillation
        self.balance, self.weight = settings.router_aux_loss_coef, settings.embedding_weight
        watch.keep = self.balance > 0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        labels, sentences = inputs.pop("labels"), inputs.pop("sentences", None)
        self.watch.real = inputs["attention_mask"]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        loss = mean_loss(*predictions(model, head, inputs, labels))
        if self.balance:
            top_k = self.accelerator.unwrap_model(model).config.num_experts_per_tok
            logits: Any = tuple(self.watch.logits)
            loss += self.balance * load_balancing_loss_func(logits, 2, top_k, self.watch.real)
        if self.distillation is not None:
            self.watch.off = True  # what is watched is the use on chats
            with self.accelerator.autocast():
                distance = self.distillation.distance(sentences)  # type: ignore[arg-type]
            self.watch.off = False
            self.distance = distance.detach()
            loss = loss + self.weight * distance
        return loss

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        more = self.watch.metrics() if "loss" in logs else {}
        if more and self.distillation is not None:
            more["embedding_distance"] = self.distance.item()
        super().log(logs | more, *arguments)


def train(
    model: PreTrainedModel,
    settings: MoeSection,
    chats: list[Chat],
    stage_run: StageRun,
    distillation: Distillation | None = None,
) -> list[dict[str, Any]]:
    """Train every router of the mixture in place, and nothing else; returns the log.

    distillation: the sentences of `objective: both`; without them chats alone count. Raises
    UserError for a model that is no mixture.
    """
    if not routes.is_mixture(model):
        raise UserError(f"model.name: {model.name_or_path} is no mixture of two experts")
    if settings.max_steps == 0:
        return []
    check_enough_rows(len(chats), settings, "ubmoe.dataset")
    log.info("%d chats; routers of %d layers train", len(chats), len(routes.blocks(model)))
    model.requires_grad_(False)
    for value in routers.router_weights(model).values():
        value.requires_grad = True
    key = resume_key(model, digest_of_frozen(model)) | {"data": _digest(chats, distillation)}
    collated = distillation.collated if distillation else collate
    bf16 = uses_bfloat16(settings.bf16, model.device)
    with sharding(model, settings, stage_run.distributed, bf16), _watching(model) as watch:
        history = run_trainer(
            partial(RouterTrainer, model, settings, watch, distillation, data_collator=collated),
            settings,
            stage_run,
            distillation or chats,
            model.device,
            key=key,
            remove_unused_columns=False,
        )
    model.requires_grad_(False).eval()
    return history


def _digest(chats: list[Chat], distillation: Distillation | None) -> str:
    """The digest of the chats as tokens, and of the sentences as the encoder reads them."""
    rows: list[object] = [] if distillation is None else distillation.form()
    return digest_of_rows(chain(((chat.ids, chat.answer) for chat in chats), rows))
