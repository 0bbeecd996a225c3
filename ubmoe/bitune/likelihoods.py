"""A Bitune model for lm-eval: contexts are prompts, read as the variant reads them."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ubmoe.bitune.model import Bitune
from ubmoe.evaluate.harness import SharedPrefixLM


class Likelihoods(SharedPrefixLM):
    """`lm_eval.simple_evaluate` with a Bitune model; contexts too long are cut on the left."""

    def __init__(self, bitune: Bitune, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=bitune.decoder, tokenizer=tokenizer, batch_size=batch_size)
        self.bitune = bitune

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The whole text's tokens, parted as those of training: `data.tokens.split_ids`."""
        alone, _ = super()._encode_pair(context, continuation)
        whole = self.tok_encode(context + continuation)
        return whole[: len(alone)], whole[len(alone) :]

    def prefill(self, ids: Tensor, mask: Tensor) -> Any:
        return self.bitune.prefill(ids, mask)

    def answering(self) -> AbstractContextManager[Any]:
        return self.bitune.answering()

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **keys: Any
    ) -> Any:
        cache = self.bitune.prefill_for_generate(context, **keys)
        with torch.no_grad(), self.bitune.answering():
            return super()._model_generate(context, max_length, stop, past_key_values=cache, **keys)
