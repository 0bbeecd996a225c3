"""Attention dependence DP of a model on texts: by length bucket, by layer and head, with errors.

Each text counts once, whatever its length (UBMoE, ICML 2025, section 3 and Table 3). DP depends on
the length: attention that prefers nothing gives main = 1/T and before = after = (T-1)/2T, so that
share stands beside every number.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.config import DependenceSection, UserError
from ubmoe.data.padding import batches_by_length, padded_with_mask
from ubmoe.data.rows import Text
from ubmoe.dependence.recorder import dependence_of, probing
from ubmoe.models.loading import context_length
from ubmoe.recording import replace
from ubmoe.report.tables import SHARES

log = logging.getLogger(__name__)
SAVE_EVERY = 30.0  # seconds between two partial states


@dataclass
class Totals:
    """Sums over the texts measured so far: so small that they are saved and gathered whole."""

    shares: Any = 0.0  # (L, H, 3), once there is a text
    # text -> tokens, main, before, after
    texts: dict[int, tuple[int, float, float, float]] = field(default_factory=dict)

    def add(self, text: int, tokens: int, shares: np.ndarray) -> None:
        self.shares = self.shares + shares
        self.texts[text] = (tokens, *shares.mean((0, 1)))

    def merge(self, other: "Totals") -> None:
        self.shares = self.shares + other.shares
        self.texts |= other.texts


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[Text], chat_template: str | None = None
) -> list[list[int]]:
    """Token ids of each text; chats go through the tokenizer's own chat template, or the one named.

    Raises UserError for chats without any template, one that fails on a chat, and a text without
    tokens.
    """
    template = _template(chat_template)  # None: the tokenizer's own, which may be a named set
    if template is None and tokenizer.chat_template is None and any(text.is_chat for text in texts):
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; name a Jinja file or "
            "string as dependence.chat_template"
        )
    ids = []
    for text in texts:
        try:
            ids.append(_tokens(tokenizer, text, template))
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(f"{text.where}: the chat template fails ({error})") from error
        if not ids[-1]:
            raise UserError(f"{text.where}: empty text; it has no tokens")
    return ids


def _tokens(tokenizer: PreTrainedTokenizerBase, text: Text, template: Any) -> list[int]:
    if isinstance(text.content, str):
        return tokenizer(text.content, truncation=False)["input_ids"]
    rendered = tokenizer.apply_chat_template(text.content, chat_template=template, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False, truncation=False)["input_ids"]


def _template(named: str | None) -> str | None:
    if named is None or ("{" in named and not os.path.isfile(named)):
        return named
    try:
        return Path(named).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"dependence.chat_template: {named} cannot be read ({error}); expected a Jinja file "
            "or string"
        ) from error


def cut(
    model: PreTrainedModel, texts: list[list[int]], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Texts cut at `max_tokens` and at the model's context, and how many were longer."""
    limit = min(max_tokens, context_length(model) or max_tokens)
    return [text[:limit] for text in texts], sum(len(text) > limit for text in texts)


def measure(
    model: PreTrainedModel,
    texts: list[list[int]],
    settings: DependenceSection,
    directory: Path,
    resume: bool = False,
) -> dict[str, Any]:
    """The `dependence` section of the result, in percent.

    texts: token ids, already cut. Under torchrun every process measures its share of the batches
    and all return the same numbers. A run that is interrupted leaves its sums in `directory`, where
    `resume` finds them.
    """
    state = PartialState()
    _check_vocabulary(model, texts)
    batches = batches_by_length(texts, settings.batch_tokens)[
        state.process_index :: state.num_processes
    ]
    partial = Partial(directory, state, _fingerprint(model, texts, settings))
    totals, done = partial.load() if resume else (Totals(), 0)
    everything = sum(len(texts[text]) for batch in batches for text in batch)
    bar = tqdm(
        total=everything,
        unit="token",
        unit_scale=True,
        desc="dependence",
        disable=not state.is_main_process,
    )
    with probing(model) as probe, bar, partial.kept_on_interrupt(totals, batches):
        for number, batch in enumerate(batches):
            if number >= done:
                inputs = padded_with_mask([texts[text] for text in batch])
                ids, mask = (value.to(model.device) for value in inputs.values())
                shares = dependence_of(model, probe, ids, mask).numpy()  # (B, L, H, 3)
                for text, each in zip(batch, shares, strict=True):
                    totals.add(text, len(texts[text]), each)
                if time.monotonic() - partial.saved > SAVE_EVERY:
                    partial.save(totals, number + 1)
            bar.update(sum(len(texts[text]) for text in batch))
    gathered = Totals()
    for part in gather_object([totals]):
        gathered.merge(part)
    return summary(gathered, settings.buckets)


def bucket_of(tokens: int, edges: list[int]) -> int:
    """Index of the bucket (low, high] that a length belongs to, or -1."""
    inside = (number for number, (low, high) in enumerate(pairwise(edges)) if low < tokens <= high)
    return next(inside, -1)


def _check_vocabulary(model: PreTrainedModel, texts: list[list[int]]) -> None:
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    largest = max(map(max, texts))
    if largest >= rows:
        raise UserError(
            f"{model.name_or_path}: its tokenizer gives id {largest}, the model has {rows} "
            "embeddings; they do not belong together"
        )


# --- the result -----------------------------------------------------------------------------------


def summary(totals: Totals, edges: list[int]) -> dict[str, Any]:
    """Means in percent: overall, by bucket, layer, head; errors over texts; the uniform share."""
    texts = [totals.texts[text] for text in sorted(totals.texts)]
    count = len(texts)
    layers = totals.shares / count * 100  # (L, H, 3)
    buckets = []
    for number, (low, high) in enumerate(pairwise(edges)):
        members = [each for each in texts if bucket_of(each[0], edges) == number]
        buckets.append({"range": [low, high], **_means(members), "uniform": _uniform(members)})
    overall = _means(texts)
    return {
        "overall": _named([overall[share] for share in SHARES]),
        "stderr": overall["stderr"],
        "uniform": _uniform(texts),
        "buckets": buckets,
        "layers": [
            {**_named(layer.mean(0)), "heads": [_named(head) for head in layer]} for layer in layers
        ],
        "texts": count,
        "outside_buckets": count - sum(bucket["texts"] for bucket in buckets),
        "tokens": sum(each[0] for each in texts),
    }


def _named(shares: Any) -> dict[str, float]:
    return dict(zip(SHARES, map(float, shares), strict=True))


def _means(texts: list[tuple[int, float, float, float]]) -> dict[str, Any]:
    """Mean and standard error over texts, in percent; null where there are too few."""
    shares = np.array([each[1:] for each in texts]).reshape(-1, 3) * 100
    missing = dict.fromkeys(SHARES)
    stderr = _named(shares.std(0, ddof=1) / len(texts) ** 0.5) if len(texts) > 1 else missing
    return {"texts": len(texts), **(_named(shares.mean(0)) if texts else missing), "stderr": stderr}


def _uniform(texts: list[tuple[int, float, float, float]]) -> dict[str, Any]:
    """What attention without any preference gives on the same lengths, in percent."""
    if not texts:
        return dict.fromkeys(SHARES)
    lengths = np.array([each[0] for each in texts])
    other = ((lengths - 1) / (2 * lengths)).mean() * 100
    return _named([(1 / lengths).mean() * 100, other, other])


# --- an interrupted run ---------------------------------------------------------------------------


class Partial:
    """The sums of an unfinished run, one file a process, replaced whole every half minute."""

    def __init__(self, directory: Path, state: PartialState, mark: str) -> None:
        self.path = (
            directory / f"dependence.partial-{state.process_index}-of-{state.num_processes}.npz"
        )
        self.mark = mark
        self.saved = time.monotonic()

    @contextmanager
    def kept_on_interrupt(self, totals: Totals, batches: list[list[int]]) -> Iterator[None]:
        """Save what is complete on Ctrl-C; a batch that was only half added is not."""
        try:
            yield
        except KeyboardInterrupt:
            ends = accumulate(len(batch) for batch in batches)
            done = next((n for n, end in enumerate(ends, 1) if end == len(totals.texts)), None)
            if done is not None:
                self.save(totals, done)
            raise

    def save(self, totals: Totals, done: int) -> None:
        texts = np.array([(text, *each) for text, each in totals.texts.items()])

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, mark=self.mark, done=done, texts=texts, shares=totals.shares)

        replace(self.path, write)
        self.saved = time.monotonic()

    def load(self) -> tuple[Totals, int]:
        """The sums and the number of batches done; none where nothing of the same run is left."""
        if not self.path.exists():
            return Totals(), 0
        try:
            with np.load(self.path, allow_pickle=False) as file:
                mark, done, rows = str(file["mark"]), int(file["done"]), file["texts"].tolist()
                shares = file["shares"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            mark, done, rows, shares = "", 0, [], 0.0
        if mark != self.mark:
            log.info("%s: of another model, data or setting; starting afresh", self.path)
            return Totals(), 0
        log.info("resuming after %d texts", len(rows))
        return Totals(
            shares, {int(text): (int(tokens), *each) for text, tokens, *each in rows}
        ), done


def _fingerprint(
    model: PreTrainedModel, texts: list[list[int]], settings: DependenceSection
) -> str:
    """Of all that the numbers depend on, the weights by their sums."""
    weights = [each.detach().sum(dtype=torch.float32).item() for each in model.parameters()]
    named = [model.config.to_dict(), settings.model_dump(), str(model.dtype)]
    return hashlib.sha256(json.dumps([weights, texts, named], default=str).encode()).hexdigest()
