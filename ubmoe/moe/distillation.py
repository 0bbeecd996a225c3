"""One router for both uses: the encoder's own vectors as a second objective of router training.

On sentences, under the encoder's mask, the mixture's vectors are drawn towards those of the forced
bi route, which are the encoder's exactly. Not in the paper, whose routers see chats only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ubmoe.bidirectional import attending
from ubmoe.config import UserError
from ubmoe.data.chats import Chat, collate
from ubmoe.encoder.sentence_encoder import own_prompt, rendered
from ubmoe.models.digests import digest, digest_of_tokenizer
from ubmoe.moe.routes import route_of

CENTRED_ON = 256  # sentences whose mean vector is the encoder's


class Distillation(Dataset[tuple[Chat, str]]):
    """Chats, each with a sentence; and how far the mixture's vectors are from the encoder's.

    encoder: in the tuned encoder's form, its inner model the mixture's. bidirectional: its mask.
    """

    def __init__(
        self,
        chats: list[Chat],
        sentences: Sequence[str],
        encoder: SentenceTransformer,
        model: PreTrainedModel,
        bidirectional: bool = True,
    ) -> None:
        if not sentences:
            raise UserError("ubmoe.sentences: empty; expected sentences for objective both")
        self.chats, self.sentences = chats, sentences
        self.encoder, self.model, self.bidirectional = encoder, model, bidirectional
        with attending(model, bidirectional), route_of(model, "bi"):
            some = encoder.encode(list(sentences[:CENTRED_ON]), convert_to_tensor=True)
        self.centre = some.float().mean(0).clone()

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, row: int) -> tuple[Chat, str]:
        return self.chats[row], self.sentences[row % len(self.sentences)]

    def form(self) -> list[object]:
        """The sentences, and what of the encoder decides their vectors beside its weights."""
        encoder: Any = self.encoder
        _, *after = encoder  # the pooling, and perhaps a whitening
        pooling = [
            [module.get_config_dict(), digest(module.state_dict().items())] for module in after
        ]
        tokenizer = digest_of_tokenizer(encoder.tokenizer)
        reading = [
            encoder.max_seq_length,
            rendered(encoder, "text"),
            own_prompt(encoder),
            tokenizer,
        ]
        return [reading, pooling, self.bidirectional, *self.sentences]

    def collated(self, rows: list[tuple[Chat, str]]) -> dict[str, Any]:
        """The chats as `collate` gives them, and the sentences as the encoder reads them."""
        texts = [sentence for _, sentence in rows]
        features = self.encoder.preprocess(texts, prompt=own_prompt(self.encoder))
        return {**collate([chat for chat, _ in rows]), "sentences": dict(features)}

    def distance(self, features: dict[str, Any]) -> Tensor:
        """1 - cosine of the mixture's vector and the encoder's, the mean over sentences.

        Both are taken from the encoder's mean vector: what all sentences share would hide how they
        differ.
        """
        with attending(self.model, self.bidirectional):
            with torch.no_grad(), route_of(self.model, "bi"):
                target = self.encoder(dict(features))["sentence_embedding"]
            embedding = self.encoder(dict(features))["sentence_embedding"]
        embedding, target = (vectors.float() - self.centre for vectors in (embedding, target))
        return (1 - cosine_similarity(embedding, target)).mean()
