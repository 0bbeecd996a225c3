"""A causal language model for lm-eval: a prompt is read once for all its answers.

It counts what it cuts, and reads no text as ended.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ubmoe.config import UserError
from ubmoe.data.padding import padded
from ubmoe.data.prompts import Example, answer_inputs, batch, prompt_inputs
from ubmoe.data.tokens import check_ids, own_ends
from ubmoe.training.losses import predictions

Request = tuple[Any, list[int], list[int]]  # (texts, context's tokens, continuation's tokens)


class SharedPrefixLM(HFLM):
    """lm-eval's HFLM with four changes.

    A question with several answers is read once, where lm-eval reads it with each of them. A
    tokenizer's last tokens are left off what goes on (lm-eval would put answers after an end
    token). Prompts that are longer than the context, of which it cuts the beginning, are counted in
    `truncated`, by task. A token that the model lacks raises UserError.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.truncated: Counter[str] = Counter()
        self.ends = own_ends(self.tokenizer)[1]
        self.instances: Sequence[Any] = ()

    def tok_encode(self, string: str, *arguments: Any, **keys: Any) -> list[int]:
        ids: list[int] = super().tok_encode(string, *arguments, **keys)
        last = len(self.ends)
        return ids[:-last] if last and ids[-last:] == self.ends else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.ends:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        left = padding_side == "left"
        mask = padded([[1] * len(row) for row in rows], left=left)
        return padded(rows, self.tokenizer.pad_token_id, left), mask

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self.instances = ()

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.look(requests)
        examples = [self._example(context, answer) for _, context, answer in requests]
        order = _order(examples)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(examples)
        size = override_bs or int(self.batch_size)
        with tqdm(total=len(order), desc="likelihoods", disable=disable_tqdm or None) as bar:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                scores = self._scores([examples[place] for place in chosen])
                for place, score in zip(chosen, scores, strict=True):
                    results[place] = score
                bar.update(len(chosen))
        return results

    def _example(self, context: list[int], answer: list[int]) -> Example:
        room = self.max_length + 1 - len(answer)
        return Example(context[-max(1, room) :], answer)

    @torch.no_grad()
    def _scores(self, examples: list[Example]) -> list[tuple[float, bool]]:
        """(log-likelihood of the answer, whether it is what greedy decoding would say)."""
        rows = {tuple(example.prompt): example for example in examples}  # a prompt once
        place = {prompt: number for number, prompt in enumerate(rows)}
        index = torch.tensor(
            [place[tuple(example.prompt)] for example in examples], device=self.device
        )
        prompts = self._on_device(batch(list(rows.values())))
        answers = self._on_device(
            batch([Example(example.prompt[-1:], example.answer) for example in examples])
        )
        cache = self.prefill(prompts["prompt_ids"], prompts["prompt_mask"])
        if cache is not None:
            cache.batch_select_indices(index)
        given = answer_inputs(
            cache, prompts["prompt_mask"][index], answers["answer_ids"], answers["answer_mask"]
        )
        with self.answering() as decoder:
            logits, tokens = predictions(
                decoder, decoder.get_output_embeddings(), given, answers["labels"]
            )
        logs, lengths = logits.log_softmax(-1), [len(example.answer) for example in examples]
        scores = logs.gather(-1, tokens[:, None])[:, 0].split(lengths)
        greedy = (logs.argmax(-1) == tokens).split(lengths)
        return [
            (score.sum().item(), bool(said.all()))
            for score, said in zip(scores, greedy, strict=True)
        ]

    def prefill(self, ids: Tensor, mask: Tensor) -> Any:
        """(B, P) prompts without their last tokens, padded left -> their cache; None for P = 0."""
        if not ids.shape[1]:
            return None
        return self.model.base_model(**prompt_inputs(ids, mask)).past_key_values

    def answering(self) -> AbstractContextManager[Any]:
        """The model that reads the answers over the cache."""
        return nullcontext(self.model)

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in inputs.items()}

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for request in requests:
            context, settings = request.args
            answer = (settings or {}).get("max_gen_toks", self.max_gen_toks)
            self._see(request, self.tok_encode(context), self.max_length - answer)
        return super().generate_until(requests, disable_tqdm)

    def look(self, requests: list[Request]) -> None:
        """Count the requests that are longer than the context, and check their tokens."""
        instances = self.instances or [None] * len(requests)
        for instance, (_, context, answer) in zip(instances, requests, strict=True):
            self._see(instance, context, self.max_length + 1 - len(answer))
            check_ids(self.tokenizer, answer, named(instance))

    def _see(self, instance: Any, context: list[int], room: int) -> None:
        if room < 1:
            raise UserError(
                f"evaluation.generation: {named(instance)}: its answer leaves no room for a prompt "
                f"in the model's {self.max_length} tokens; expected tasks of shorter answers"
            )
        check_ids(self.tokenizer, context, named(instance))
        self.truncated[getattr(instance, "task_name", None) or "all"] += len(context) > room


def _order(examples: list[Example]) -> list[int]:
    """Places by the length of the longest answer to a prompt, in powers of two, then of the prompt.

    Equal prompts stand side by side, and little is padded of either. The longest answers come
    first.
    """
    longest: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        longest[tuple(example.prompt)] = max(longest[tuple(example.prompt)], len(example.answer))

    def key(place: int) -> tuple[int, int, list[int]]:
        prompt = examples[place].prompt
        return -longest[tuple(prompt)].bit_length(), -len(prompt), prompt

    return sorted(range(len(examples)), key=key)


def named(instance: Any) -> str:
    """Where a request of lm-eval comes from."""
    task, number = (getattr(instance, name, None) for name in ("task_name", "doc_id"))
    return f"{task}: document {number}" if task else "a request of lm-eval"
