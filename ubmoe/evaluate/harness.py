"""A causal language model for lm-eval, which counts what it cuts, and reads no text as ended."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ubmoe.config import UserError
from ubmoe.data.padding import padded
from ubmoe.data.tokens import check_ids, own_ends

Request = tuple[Any, list[int], list[int]]  # (texts, context's tokens, continuation's tokens)


class Asked(HFLM):
    """lm-eval's own model, with three things seen to.

    A tokenizer's last tokens are left off what goes on (lm-eval would put answers after an end
    token). Prompts that are longer than the context, of which it cuts the beginning, are counted in
    `truncated`, by task. A token that the model lacks is said: UserError.
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

    def _loglikelihood_tokens(self, requests: list[Request], *rest: Any, **keys: Any) -> Any:
        self.look(requests)
        return super()._loglikelihood_tokens(requests, *rest, **keys)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for each in requests:
            context, settings = each.args
            answer = (settings or {}).get("max_gen_toks", self.max_gen_toks)
            self._see(each, self.tok_encode(context), self.max_length - answer)
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


def named(instance: Any) -> str:
    """Where a request of lm-eval comes from."""
    task, number = (getattr(instance, name, None) for name in ("task_name", "doc_id"))
    return f"{task}: document {number}" if task else "a request of lm-eval"
