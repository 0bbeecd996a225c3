"""Echo embeddings (Springer et al., 2024): a text is read twice, its vector is of the second copy.

A causal model's tokens have then seen the whole text. sentence-transformers cannot say this: its
chat templates can repeat a text, but it cuts what is too long at its end, so the second copy alone,
and what it leaves out of a mean is as many first tokens in every text. So a module does it.
"""

from collections.abc import Sequence
from typing import Any

from sentence_transformers.base.modules import Transformer

from ubmoe.data.padding import padded

POOLED = "pooled_mask"  # beside attention_mask in the features: the tokens of the second copy


class EchoTransformer(Transformer):
    """Reads each text in the template `echo`, which has two {text}, and pools the second copy.

    Saved encoders name it in modules.json, as LayeredTransformer, and its template in
    sentence_bert_config.json. It needs a fast tokenizer, which knows where a token stands.
    """

    config_keys = [*Transformer.config_keys, "echo"]

    def __init__(self, *arguments: Any, echo: str, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        self.echo = echo

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[str], prompt: str | None = None, **keys: Any
    ) -> dict[str, Any]:
        """Texts -> (B, T) input_ids, attention_mask, and the mask of the second copies.

        Of a text that is too long each copy loses its end, and the template nothing.
        """
        tokenizer: Any = self.tokenizer
        texts = [(prompt or "") + text for text in inputs]
        whole = [self.echo.replace("{text}", text) for text in texts]
        encoded = tokenizer(whole, return_offsets_mapping=True, truncation=False, verbose=False)
        limit = keys.get("max_length") or self.max_seq_length
        rows = [
            within(ids, self._copies(text, offsets), limit)
            for text, ids, offsets in zip(
                texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]
        left = tokenizer.padding_side == "left"
        return {
            "input_ids": padded([ids for ids, _ in rows], tokenizer.pad_token_id, left),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], left=left),
            POOLED: padded([second for _, second in rows], left=left),
            "modality": "text",
        }

    def _copies(self, text: str, offsets: Sequence[tuple[int, int]]) -> list[range]:
        """The tokens of both copies, by the characters that each token stands for."""
        before, between, _ = self.echo.split("{text}")
        starts = len(before), len(before) + len(text) + len(between)
        copies = []
        for start in starts:
            end = start + len(text)
            places = [n for n, (low, high) in enumerate(offsets) if low < end and high > start]
            copies.append(range(places[0], places[-1] + 1) if places else range(0))
        return copies

    def forward(self, features: dict[str, Any], **keys: Any) -> dict[str, Any]:
        """As its parent; what it is given stays as it is, for a cached loss reads it again."""
        read = {name: value for name, value in features.items() if name != POOLED}
        return pooled(super().forward(read, **keys) | {POOLED: features[POOLED]})


def pooled(features: dict[str, Any]) -> dict[str, Any]:
    """The features with the mask of the tokens that are pooled, where these are not all."""
    return features | {"attention_mask": features.get(POOLED, features["attention_mask"])}


def within(ids: list[int], copies: list[range], limit: int | None) -> tuple[list[int], list[int]]:
    """Ids of at most `limit` tokens, both copies cut alike, and the 0/1 mask of the second."""
    extra = len(ids) - limit if limit else 0
    length = (sum(map(len, copies)) - extra) // 2
    kept = [copy[: max(0, length)] if extra > 0 else copy for copy in copies]
    dropped = {
        place for copy, some in zip(copies, kept, strict=True) for place in copy[len(some) :]
    }
    places = [place for place in range(len(ids)) if place not in dropped]
    return [ids[place] for place in places], [int(place in kept[1]) for place in places]
