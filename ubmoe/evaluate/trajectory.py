"""An encoder scored while it trains: the similarity it gains, the language modelling it loses.

One run with a constant learning rate is a whole front: at each of `trajectory.steps` the encoder is
scored on pairs, and the language model that it is made from, read causally, on chats and texts. The
points stand in the trainer's log, so that they are in every checkpoint and survive a kill.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ubmoe.bidirectional import attending
from ubmoe.config import Config, StageSection, UserError
from ubmoe.data.chats import Chat, read_chats
from ubmoe.data.messages import CHATS
from ubmoe.data.rows import read_texts, spaced, training_rows
from ubmoe.data.tokens import chunks_of, sentences_of
from ubmoe.dependence.measure import measure
from ubmoe.dependence.texts import cut, tokenize
from ubmoe.evaluate.generation import perplexity
from ubmoe.evaluate.sts import sts_scores, sts_tasks
from ubmoe.training.allocator import return_freed_memory

POINT = "point"  # a point's key in a trainer's log


class Trajectory:
    """The data that an encoder is scored on, read before anything trains. Raises UserError.

    config: within the model's context.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        settings = config.trajectory
        if PartialState().num_processes > 1:
            raise UserError("trajectory.steps: is for one process; expected [] under torchrun")
        self.config, self.steps = config, settings.steps
        self.tasks = sts_tasks(settings.sts)
        self.texts = {
            Path(dataset).stem: _texts(dataset, config, tokenizer)
            for dataset in settings.perplexity
        }
        if len(self.texts) < len(settings.perplexity):
            raise UserError("trajectory.perplexity: two of one name; expected names that differ")
        self.measured: list[list[int]] = []
        if settings.dependence:
            asked = config.dependence
            texts = read_texts(asked.dataset, asked.max_texts)
            self.measured = tokenize(tokenizer, texts, asked.chat_template)

    def callback(
        self, encoder: SentenceTransformer, model: PreTrainedModel, stage: StageSection
    ) -> TrainerCallback:
        """The callback of a stage whose modules are about to train."""
        return Scoring(self, encoder, model, stage)

    @torch.no_grad()
    def point(
        self, encoder: SentenceTransformer, model: PreTrainedModel, stage: StageSection
    ) -> dict[str, Any]:
        """The scores of an encoder, and of `model`, its language model, as they are now."""
        return_freed_memory()
        evaluation = self.config.evaluation
        encoder.max_seq_length, length = self.config.bi.max_tokens, encoder.max_seq_length
        scores: dict[str, Any] = {
            "sts": sts_scores(encoder, self.tasks, evaluation.batch_size, stage.bf16)
        }
        encoder.max_seq_length = length
        with attending(model, bidirectional=False):
            scores["perplexity"] = {
                name: perplexity(model, chats, stage.bf16) for name, chats in self.texts.items()
            }
            if self.measured:
                scores["dependence"] = self._dependence(model)
        return_freed_memory()
        return scores

    def _dependence(self, model: PreTrainedModel) -> dict[str, Any]:
        ids, _ = cut(model, self.measured, self.config.dependence.max_tokens)
        with TemporaryDirectory() as folder:
            return measure(model, ids, self.config.dependence, Path(folder))


def _texts(dataset: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> Sequence[Chat]:
    """Chats, of which the answers count, or chunks of texts, of which every token does."""
    settings = config.trajectory
    first = next(iter(training_rows(dataset, 1))).fields
    if dataset == "tiny" or any(name in first for name in CHATS):
        return read_chats(dataset, tokenizer, settings.max_tokens, settings.max_texts).chats
    lines = sentences_of(dataset, tokenizer, blank=True)
    chunks = chunks_of(lines, tokenizer, settings.max_tokens, dataset)
    return [
        Chat(dataset, ids, [True] * len(ids), ["answer"] * len(ids))
        for ids in spaced(chunks, settings.max_texts)
    ]


class Scoring(TrainerCallback):
    """Adds a point to the trainer's log before the first step, and after each chosen one."""

    def __init__(
        self,
        trajectory: Trajectory,
        encoder: SentenceTransformer,
        model: PreTrainedModel,
        stage: StageSection,
    ) -> None:
        self.trajectory, self.encoder, self.model, self.stage = trajectory, encoder, model, stage
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        self.start = {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if name in trained and stage.lora is None
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._add(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.trajectory.steps:
            self._add(state)

    def _add(self, state: Any) -> None:
        with undisturbed(self.encoder):
            point = self.trajectory.point(self.encoder, self.model, self.stage)
        point["distance"] = self._distance()
        state.log_history.append({"step": state.global_step, POINT: point})

    @torch.no_grad()
    def _distance(self) -> float:
        """How far the trained matrices are from where they began, over their norm: Frobenius's."""
        moved, whole = 0.0, 0.0
        for name, value in self.model.named_parameters():
            if name in self.start:
                moved += (value - self.start[name]).float().pow(2).sum().item()
                whole += self.start[name].float().pow(2).sum().item()
        layers: list[Any] = [
            module for module in self.model.modules() if isinstance(module, LoraLayer)
        ]
        for layer in layers:  # none where modules train in full
            moved += layer.get_delta_weight("default").float().pow(2).sum().item()
            whole += layer.get_base_layer().weight.float().pow(2).sum().item()
        return (moved / whole) ** 0.5


@contextmanager
def undisturbed(encoder: SentenceTransformer) -> Iterator[None]:
    """In eval mode inside; mode and random states are as they were afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    training = encoder.training
    with torch.random.fork_rng():
        encoder.eval()
        try:
            yield
        finally:
            encoder.train(training)
            random.setstate(python)
            np.random.set_state(numbers)


def parted(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`stages`: the reports of stages without points in their logs; `trajectory`: the points, if
    there are any, each with its stage and step.
    """
    points = [
        {"stage": number, "step": row["step"], **row[POINT]}
        for number, report in enumerate(reports)
        for row in report["log"]
        if POINT in row
    ]
    stages = [
        report | {"log": [row for row in report["log"] if POINT not in row]} for report in reports
    ]
    return {"stages": stages} | ({"trajectory": points} if points else {})
