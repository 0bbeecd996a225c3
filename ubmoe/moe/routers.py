"""Router training: ordinary chat fine-tuning with everything but the routers frozen.

Causal mask, loss on the assistant's tokens only. What is watched is the weight that the routers
give to the bi expert, and how undecided they are.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from ubmoe.config import MixtureSection, UserError
from ubmoe.data.chats import Chat, labelled
from ubmoe.moe import model as moe
from ubmoe.moe.distillation import Both
from ubmoe.training.losses import mean_loss, predictions
from ubmoe.training.trainer import (
    Careful,
    StopOnBadLoss,
    Work,
    arguments,
    begin,
    digest_of_frozen,
    enough_rows,
    fit,
)

log = logging.getLogger(__name__)
FITTED_ON = 100  # chats that `router_init: uni` is fitted on
ROLES = ("prompt", "answer", "template", "punctuation")


# --- the start ------------------------------------------------------------------------------------


def start(
    model: PreTrainedModel,
    settings: MixtureSection,
    chats: list[Chat],
    held_out: list[Chat],
    seed: int,
) -> dict[str, Any]:
    """Set the routers as `router_init` says; returns the share of held-out tokens on the uni side.

    `zeros` is the exact average of the two FFNs at top_k 2.
    """
    if settings.router_init == "normal":
        moe.start_routers(model, seed)
    elif settings.router_init == "uni":
        moe.fit_routers(model, [torch.tensor([chat.ids]) for chat in chats[:FITTED_ON]])
    texts = [torch.tensor([chat.ids]) for chat in held_out[:FITTED_ON]]
    uni_side = torch.cat([share.flatten() < 0.5 for share in moe.bi_share(model, texts)])
    report = {"uni_side_percent": uni_side.float().mean().item() * 100}
    log.info("routers start from %s: %s", settings.router_init, report)
    return report


# --- training -------------------------------------------------------------------------------------


class _Watch:
    """Mean weight of bi and mean entropy of the routers over the real tokens of a batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.real: Tensor | None = None
        layers = len(moe.blocks(model))
        self.bi, self.entropy = [0.0] * layers, [0.0] * layers
        self.keep, self.logits = False, [torch.empty(0)] * layers
        self.off = False

    def see(self, layer: int, logits: Tensor) -> None:
        if self.off:
            return
        if self.keep:
            self.logits[layer] = logits
        probabilities = logits.detach().float().softmax(-1)
        if self.real is not None:
            probabilities = probabilities[self.real.flatten().bool()]
        entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)
        self.bi[layer] = probabilities[:, moe.BI].mean().item()
        self.entropy[layer] = entropy.mean().item()

    def metrics(self) -> dict[str, Any]:
        count = len(self.bi)
        return {
            "bi_weight": sum(self.bi) / count,
            "router_entropy": sum(self.entropy) / count,
            "bi_weight_by_layer": list(self.bi),
        }


@contextmanager
def _watching(model: PreTrainedModel) -> Iterator[_Watch]:
    watch = _Watch(model)
    hooks = [
        block.gate.register_forward_hook(
            lambda _, __, output, layer=layer: watch.see(layer, output[0])
        )
        for layer, block in enumerate(moe.blocks(model))
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class _Trainer(Careful, Trainer):
    watch: _Watch
    balance = 0.0  # router_aux_loss_coef
    both: Both | None = None
    weight = 0.0  # of the distance from the encoder's vectors
    distance = 0.0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        labels, sentences = inputs.pop("labels"), inputs.pop("sentences", None)
        self.watch.real = inputs["attention_mask"]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        loss = mean_loss(*predictions(model, head, inputs, labels))
        if self.balance:
            top_k = self.accelerator.unwrap_model(model).config.num_experts_per_tok
            logits: Any = tuple(self.watch.logits)
            loss += self.balance * load_balancing_loss_func(logits, 2, top_k, self.watch.real)
        if self.both is not None:
            self.watch.off = True  # what is watched is the use on chats
            with self.accelerator.autocast():
                distance = self.both.distance(sentences)  # type: ignore[arg-type]
            self.watch.off = False
            self.distance = distance.item()
            loss = loss + self.weight * distance
        return loss

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        more = self.watch.metrics() if "loss" in logs else {}
        if more and self.both is not None:
            more["embedding_distance"] = self.distance
        super().log(logs | more, *arguments)


def train(
    model: PreTrainedModel,
    settings: MixtureSection,
    chats: list[Chat],
    work: Work,
    both: Both | None = None,
) -> list[dict[str, Any]]:
    """Train every router of the mixture in place, and nothing else; returns the log.

    both: the sentences of `objective: both`; without them chats alone count. Raises UserError for a
    model that is no mixture.
    """
    if not moe.is_mixture(model):
        raise UserError(f"model.name: {model.name_or_path} is no mixture of two experts")
    if settings.max_steps == 0:
        return []
    enough_rows(len(chats), settings, "ubmoe.dataset")
    model.requires_grad_(False)
    for value in moe.routers(model).values():
        value.requires_grad = True
    keys = arguments(settings, work, model.device)
    with _watching(model) as watch, redirect_stdout(sys.stderr):
        trainer = _Trainer(
            model,
            TrainingArguments(**keys, remove_unused_columns=False),
            train_dataset=both or chats,  # type: ignore[arg-type]
            data_collator=both.collated if both else labelled,  # type: ignore[arg-type]
            callbacks=[StopOnBadLoss()],
        )
        trainer.watch, trainer.balance = watch, settings.router_aux_loss_coef
        watch.keep = trainer.balance > 0
        trainer.both, trainer.weight = both, settings.embedding_weight
        log.info("%d chats; routers of %d layers train", len(chats), len(moe.blocks(model)))
        checkpoint = begin(settings, work, weights=digest_of_frozen(model), rows=len(chats))
        history = fit(trainer, checkpoint)
    model.requires_grad_(False).eval()
    return history


# --- afterwards -----------------------------------------------------------------------------------


def shares_by_role(model: PreTrainedModel, chats: list[Chat]) -> list[dict[str, float | None]]:
    """For each layer, the mean weight of bi over the tokens of each role; None without such."""
    shares = torch.cat(moe.bi_share(model, [torch.tensor([chat.ids]) for chat in chats]), dim=1)
    roles = [role for chat in chats for role in chat.roles]
    places = {role: torch.tensor([each == role for each in roles]) for role in ROLES}
    return [
        {role: layer[at].mean().item() if at.any() else None for role, at in places.items()}
        for layer in shares
    ]
