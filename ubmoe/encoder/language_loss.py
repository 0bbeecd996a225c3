"""The language-model loss, kept on beside a contrastive stage: the control that GritLM asks for.

GritLM (2402.09906) trains both uses jointly and loses nothing of generation. Here a stage adds
`lm_weight` times the causal next-token loss on chats (their answers) or texts, in the modules that
the stage trains.
"""

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bidirectional import attending
from ubmoe.config import StageSection, UserError
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.chats import Chat, collate, read_chats
from ubmoe.data.rows import Text, read_texts
from ubmoe.data.tokens import check_ids
from ubmoe.training.losses import mean_loss, predictions


def read_language(stage: StageSection, tokenizer: PreTrainedTokenizerBase) -> list[Chat]:
    """The data of the language-model loss; [] where it is off. Raises UserError naming the row."""
    if not stage.lm_weight:
        return []
    texts = read_texts(stage.lm_dataset, stage.lm_max_rows)
    if texts[0].is_chat:
        chats = read_chats(
            stage.lm_dataset, tokenizer, stage.lm_max_tokens, stage.lm_max_rows
        ).chats
    else:
        chats = list(usable(lambda text: _plain(text, tokenizer, stage.lm_max_tokens), texts))
    if len(chats) < stage.lm_batch_size:
        raise UserError(
            f"{stage.lm_dataset}: {len(chats)} rows; expected bi.stages.N.lm_batch_size="
            f"{stage.lm_batch_size} at least"
        )
    return chats


def _plain(text: Text, tokenizer: PreTrainedTokenizerBase, most: int) -> Chat:
    """A text all of whose tokens are predicted."""
    if not isinstance(text.content, str):
        raise RowError(text.where, "a chat among texts; expected one or the other")
    ids = tokenizer(text.content, verbose=False)["input_ids"]
    check_ids(tokenizer, ids, text.where)
    kept = ids[:most]
    roles = ["answer"] * len(kept)
    return Chat(text.where, kept, [True] * len(kept), roles, cut=len(ids) > most)


class LanguageLoss:
    """step -> the mean loss of a batch of its own, drawn by (seed, step): a resumed run's is the
    same. Causal, without dropout.
    """

    def __init__(self, model: PreTrainedModel, chats: list[Chat], rows: int, seed: int) -> None:
        self.model, self.chats, self.rows, self.seed = model, chats, rows, seed

    def __call__(self, step: int) -> Tensor:
        draw = np.random.default_rng((self.seed, step))
        chosen = draw.choice(len(self.chats), self.rows, replace=False)
        inputs = collate([self.chats[row] for row in chosen])
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        labels = inputs.pop("labels")
        with attending(self.model, bidirectional=False):
            head = self.model.get_output_embeddings()
            return mean_loss(*predictions(self.model, head, inputs, labels))
