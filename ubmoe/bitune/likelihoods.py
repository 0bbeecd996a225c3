"""A Bitune model for lm-eval: contexts are prompts, and each is read once for all its answers."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ubmoe.bitune.examples import Example, batch
from ubmoe.bitune.model import Bitune
from ubmoe.data.padding import IGNORE_INDEX
from ubmoe.evaluate.harness import Asked, Request


class Likelihoods(Asked):
    """`lm_eval.simple_evaluate` with a Bitune model; contexts too long are cut on the left."""

    def __init__(self, bitune: Bitune, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=bitune.decoder, tokenizer=tokenizer, batch_size=batch_size)
        self.bitune = bitune

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The whole text's tokens, parted as those of training: `data.tokens.split_ids`."""
        alone, _ = super()._encode_pair(context, continuation)
        whole = self.tok_encode(context + continuation)
        return whole[: len(alone)], whole[len(alone) :]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.look(requests)
        examples = [self._example(context, answer) for _, context, answer in requests]
        # equal contexts side by side, the longest first
        order = sorted(
            range(len(examples)),
            key=lambda each: (-len(examples[each].prompt), examples[each].prompt),
        )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(examples)
        size = override_bs or int(self.batch_size)
        with tqdm(total=len(order), desc="likelihoods", disable=disable_tqdm or None) as bar:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                scores = self._scores([examples[each] for each in chosen])
                for place, score in zip(chosen, scores, strict=True):
                    found[place] = score
                bar.update(len(chosen))
        return found

    def _example(self, context: list[int], answer: list[int]) -> Example:
        room = self.max_length + 1 - len(answer)
        return Example(context[-max(1, room) :], answer)

    @torch.no_grad()
    def _scores(self, examples: list[Example]) -> list[tuple[float, bool]]:
        """(log-likelihood of the answer, whether it is what greedy decoding would say)."""
        rows = {tuple(each.prompt): each for each in examples}  # a prompt once
        place = {prompt: number for number, prompt in enumerate(rows)}
        index = torch.tensor([place[tuple(each.prompt)] for each in examples], device=self.device)
        once = self._on_device(batch(list(rows.values())))
        inputs = self._on_device(batch(examples))
        cache: Any = self.bitune.prefill(once["prompt_ids"], once["prompt_mask"])
        if cache is not None:
            cache.batch_select_indices(index)
        given = self.bitune.answer_inputs(
            cache, inputs["prompt_mask"], inputs["answer_ids"], inputs["answer_mask"]
        )
        with self.bitune.answering() as decoder:
            logs = decoder(**given).logits[:, :-1].float().log_softmax(-1)
        labels = inputs["labels"][:, 1:]
        real = labels != IGNORE_INDEX
        scores = logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * real
        greedy = ((logs.argmax(-1) == labels) | ~real).all(1)
        return list(zip(scores.sum(1).tolist(), greedy.tolist(), strict=True))

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **keys: Any
    ) -> Any:
        cache = self.bitune.prefill_for_generate(context, **keys)
        with torch.no_grad(), self.bitune.answering():
            return super()._model_generate(context, max_length, stop, past_key_values=cache, **keys)
