"""Vectors centred, and their common components removed, by one stock module after the pooling.

It is fitted on unlabelled sentences. Neither all-but-the-top (Mu and Viswanath, 2018) nor
BERT-whitening (Su et al., 2021) normalises the vectors first, and no more is done here: one linear
map then holds it all, sentence-transformers' Dense. Shapes: N sentences, D numbers of a vector.
"""

import logging
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from torch import nn
from transformers import PreTrainedTokenizerBase

from ubmoe.config import Config, UserError, WhitenSection
from ubmoe.data.tokens import sentences_of
from ubmoe.models.precision import autocast

log = logging.getLogger(__name__)


def read_sentences(settings: WhitenSection | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The sentences to fit a whitening on, each once; [] without one. Raises UserError."""
    if settings is None:
        return []
    return list(dict.fromkeys(sentences_of(settings.dataset, tokenizer, settings.rows)))


def check(settings: WhitenSection | None, sentences: int, width: int) -> None:
    """Raises UserError where too few sentences have as many components as are asked for."""
    if settings is None:
        return
    needed = width if settings.remove == "whiten" else settings.remove
    if needed == width and settings.remove != "whiten" or needed > width:
        raise UserError(
            f"bi.whiten.remove: {needed} of {width} components; expected fewer, or whiten"
        )
    if sentences <= needed:
        raise UserError(
            f"bi.whiten.rows: {sentences} different sentences of {settings.dataset} have fewer "
            f"than {needed + 1} components; expected {needed + 1} at least"
        )


def whiten(
    encoder: SentenceTransformer, config: Config, sentences: list[str]
) -> dict[str, Any] | None:
    """Append the map that is fitted on the encoder's own vectors; returns its report.

    None, and nothing is done, without `bi.whiten`.
    """
    settings, scoring = config.bi.whiten, config.evaluation
    if settings is None:
        return None
    width: Any = encoder.get_embedding_dimension()
    check(settings, len(sentences), width)
    with autocast(scoring.bf16, encoder.device):
        vectors = encoder.encode(sentences, batch_size=scoring.batch_size, convert_to_tensor=True)
    weight, bias, share = fitted(vectors.double().cpu().numpy(), settings.remove)
    module = Dense(
        width,
        width,
        activation_function=nn.Identity(),
        init_weight=torch.from_numpy(weight).float(),
        init_bias=torch.from_numpy(bias).float(),
    )
    encoder.append(module.to(encoder.device, encoder.dtype).requires_grad_(False))
    log.info("whitening on %d sentences: %.1f %% of the variance removed", len(sentences), share)
    return {"sentences": len(sentences), "remove": settings.remove, "variance_removed": share}


def fitted(vectors: np.ndarray, remove: int | str) -> tuple[np.ndarray, np.ndarray, float]:
    """(N, D) -> (D, D) W and (D,) b of W x + b, and the variance that it removes, in percent.

    remove: so many first principal components; whiten: none, and all get the variance 1. Raises
    UserError for vectors that are not finite, or that have a component without any variance.
    """
    if not np.isfinite(vectors).all():
        raise UserError("bi.whiten: vectors that are not finite; expected another model.dtype")
    mean = vectors.mean(0)
    _, sizes, directions = np.linalg.svd(vectors - mean, full_matrices=False)
    if remove == "whiten":
        deviations = sizes / np.sqrt(len(vectors))
        if deviations[-1] <= np.finfo(np.float32).eps * np.abs(vectors).max():
            raise UserError(
                f"bi.whiten: {len(vectors)} sentences vary in fewer than {len(sizes)} components; "
                "expected more of them, or bi.whiten.remove as a number"
            )
        weight, gone = directions / deviations[:, None], 0.0
    else:
        top = directions[: int(remove)]
        weight = np.eye(vectors.shape[1]) - top.T @ top
        gone = float((sizes[: int(remove)] ** 2).sum() / max((sizes**2).sum(), 1e-300))
    return weight, -weight @ mean, 100 * gone
