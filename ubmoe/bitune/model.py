"""Bitune: the prompt is read twice, causally and in both directions, and the two caches are mixed.

Per layer, K = (1 - a) K_causal + a K_bidirectional and V likewise, a = |theta| / (theta_init +
|theta|) with a theta of its own for K and for V. The last prompt token is no part of the prompt: it
comes first in the answer, which is read causally over the mixed cache with the causal adapters.
Published as Bitune (2405.14862); any decoder whose cache holds keys and values, in batches.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, set_seed

from ubmoe.bidirectional import attending, prove_attention, set_layers
from ubmoe.config import BituneSection, UserError, error_reason
from ubmoe.data.prompts import answer_inputs, prompt_inputs
from ubmoe.training.losses import predictions

CAUSAL, BIDIRECTIONAL = "causal", "bidirectional"  # the adapters' names
DIFFERENCE = "difference"
OF_ADAPTER = re.compile(rf"\.({CAUSAL}|{BIDIRECTIONAL})(\.|$)")  # in a parameter's name


@dataclass(frozen=True)
class Variant:
    """Where the prompt's cache comes from.

    second: mask of the second pass, None: there is none. own: it has adapters of its own. mixed:
    its cache is mixed with the causal pass's; else it is used as it is, and there is no other pass.
    """

    second: Literal["bidirectional", "causal", "anticausal"] | None
    own: bool = True
    mixed: bool = True


# The paper's method, its ablations (Tables 5 and 8), and the baseline.
VARIANTS = {
    "full": Variant("bidirectional"),
    "naive": Variant("bidirectional", own=False, mixed=False),
    "no_mixing": Variant("bidirectional", mixed=False),
    "only_causal": Variant("causal"),
    "shared_weights": Variant("bidirectional", own=False),
    "anticausal": Variant("anticausal"),
    "lora": Variant(None, own=False, mixed=False),
}


class Bitune(nn.Module):
    """A decoder under its adapters, and theta.

    model: with the adapters of both passes; or, for use, the decoder itself with the causal ones
    merged, and `reader`, the same with what the bidirectional ones add (None: nothing).
    """

    def __init__(self, model: Any, variant: str, theta_init: float, reader: Any = None) -> None:
        super().__init__()
        self.model, self.reader = model, reader
        self.name, self.variant, self.theta_init = variant, VARIANTS[variant], theta_init
        layers = self.decoder.config.get_text_config().num_hidden_layers
        if self.variant.mixed:
            start = torch.full((layers,), theta_init, device=self.decoder.device)
            self.theta_keys = nn.Parameter(start.clone())
            self.theta_values = nn.Parameter(start.clone())

    @property
    def decoder(self) -> Any:
        """The language model that answers."""
        return _without_wrapper(self.model)

    def theta(self) -> dict[str, Tensor]:
        """(layers,) float32 each, of the `keys` and of the `values`; {} where nothing is mixed."""
        return {"keys": self.theta_keys, "values": self.theta_values} if self.variant.mixed else {}

    def alpha(self, what: str) -> Tensor:
        """(layers,) share of the second pass in the `keys` or `values`."""
        theta = self.theta()[what].abs()
        return theta / (self.theta_init + theta)

    @torch.no_grad()
    def take(self, theta: dict[str, Tensor]) -> None:
        """Another model's theta."""
        for name, value in self.theta().items():
            value.copy_(theta[name])

    # --- the prompt -------------------------------------------------------------------------------

    def prefill(self, ids: Tensor, mask: Tensor) -> Cache | None:
        """(B, P) prompts without their last tokens, padded left -> their cache; None for P = 0."""
        if not ids.shape[1]:
            return None
        variant = self.variant
        first = None
        if variant.mixed or variant.second is None:
            first = self._pass(CAUSAL, ids, mask, "causal")
        if variant.second is None:
            return first
        kind = BIDIRECTIONAL if variant.own else CAUSAL
        second = self._pass(kind, ids, mask, variant.second)
        return self._mixed(first, second) if variant.mixed else second

    def _pass(self, kind: str, ids: Tensor, mask: Tensor, attention: str) -> Any:
        seen: Tensor = mask
        if attention == "anticausal":
            seen = _anticausal(mask, self.decoder.dtype)
        owner = self.model
        if kind == BIDIRECTIONAL and self.reader is not None:
            owner = self.reader
        decoder = _without_wrapper(owner)
        with _active(owner, kind), attending(decoder, attention == "bidirectional"):
            output = decoder.base_model(**prompt_inputs(ids, mask) | {"attention_mask": seen})
        return output.past_key_values

    def _mixed(self, first: Any, second: Any) -> Any:
        keys, values = self.alpha("keys"), self.alpha("values")
        for number, (layer, other) in enumerate(zip(first.layers, second.layers, strict=True)):
            layer.keys = mix(layer.keys, other.keys, keys[number])
            layer.values = mix(layer.values, other.values, values[number])
        return first

    # --- the answer -------------------------------------------------------------------------------

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the answers' tokens and these tokens, as `losses.predictions` gives them.

        (B, P) prompts without their last tokens, padded left; (B, A) answers padded right, the last
        prompt token first; labels (B, A).
        """
        cache = self.prefill(prompt_ids, prompt_mask)
        inputs = answer_inputs(cache, prompt_mask, answer_ids, answer_mask)
        with self.answering() as decoder:
            return predictions(decoder, decoder.get_output_embeddings(), inputs, labels)

    @contextmanager
    def answering(self) -> Iterator[Any]:
        """The decoder with the causal adapters, which read and write answers."""
        with _active(self.model, CAUSAL), attending(self.decoder, bidirectional=False):
            yield self.decoder

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **keys: Any) -> Any:
        """`generate()` of transformers after our prefill of (B, P) whole prompts, padded left."""
        cache = self.prefill_for_generate(input_ids, attention_mask, **keys)
        with self.answering() as decoder:
            return decoder.generate(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **keys
            )

    @torch.no_grad()
    def prefill_for_generate(
        self, input_ids: Tensor, attention_mask: Tensor, **keys: Any
    ) -> Cache | None:
        """The cache that `generate(**keys)` wants, a row for each beam or sample."""
        cache: Any = self.prefill(input_ids[:, :-1], attention_mask[:, :-1])
        settings = keys.get("generation_config") or self.decoder.generation_config
        several = max(
            keys.get(name) or getattr(settings, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        )
        if cache is not None and several > 1:
            cache.batch_repeat_interleave(several)
        return cache


@contextmanager
def _active(model: Any, adapter: str) -> Iterator[None]:
    """One adapter is active; what trains stays as it was, though peft freezes the other one."""
    if not isinstance(model, PeftModel):
        yield
        return
    trains = [(value, value.requires_grad) for value in model.parameters()]
    model.set_adapter(adapter)
    try:
        yield
    finally:
        for value, trained in trains:
            value.requires_grad = trained


def _without_wrapper(model: Any) -> Any:
    """The decoder itself, whose layers may hold adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def mix(causal: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """(1 - alpha) causal + alpha other, in float32 at least; in the dtype of the caches."""
    kind = torch.promote_types(causal.dtype, torch.float32)
    share = alpha.to(kind)
    return ((1 - share) * causal.to(kind) + share * other.to(kind)).to(causal.dtype)


def _anticausal(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, P, P) to add to the logits: a token sees itself and later ones; padding sees itself.

    Added, since eager attention takes no true and false.
    """
    length = mask.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu()
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    seen = (later & mask[:, None, None, :].bool()) | itself
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


# --- adapters -------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, settings: BituneSection, seed: int) -> Bitune:
    """Put the variant's adapters on a decoder, in place; they and theta train, nothing else.

    Weights that no answer depends on (of the bidirectional adapters, the last layer's q, o and FFN)
    are frozen. Raises UserError for a decoder that cannot be bidirectional where the variant is,
    that takes no such adapters, or whose cache is more than keys and values.
    """
    config, variant = _adapter_config(settings), VARIANTS[settings.variant]
    if variant.second == "bidirectional":
        set_layers(model, settings.layers, settings.keep_sink, "bitune")
        with attending(model, bidirectional=True):
            prove_attention(model, bidirectional=True)
    set_seed(seed)  # a resumed run draws the same first adapters
    try:
        wrapped: Any = get_peft_model(model, config, adapter_name=CAUSAL)
        if variant.own:
            wrapped.add_adapter(BIDIRECTIONAL, config)
        bitune = Bitune(wrapped, settings.variant, settings.theta_init)
        _train_what_can_learn(bitune)
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"model.name: {type(model).__name__} does not take {settings.adapter} adapters, or its "
            f"cache is more than keys and values ({error_reason(error)}); expected attention in "
            "every layer"
        ) from error
    return bitune


def _adapter_config(settings: BituneSection) -> PeftConfig:
    if settings.adapter == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works, and saves
        target_modules="all-linear",
        use_dora=settings.adapter == "dora",
        task_type="CAUSAL_LM",
    )


def _train_what_can_learn(bitune: Bitune) -> None:
    """Leave requires_grad where one small answer gives a gradient."""
    for name, value in bitune.named_parameters():
        value.requires_grad = name.startswith("theta_") or OF_ADAPTER.search(name) is not None
    ids = torch.zeros(1, 3, dtype=torch.long, device=bitune.decoder.device)
    ones = torch.ones_like(ids)
    logits, _ = bitune(ids, ones, ids, ones, ids)
    logits.sum().backward()
    for value in bitune.parameters():
        value.requires_grad = value.grad is not None
        value.grad = None


@torch.no_grad()
def merged(bitune: Bitune) -> Bitune:
    """For use: the causal LoRA merged into the weights, so that answers come at the base's speed.

    The bidirectional pass then adds the difference of the two adapters, of twice the rank, to the
    same weights. Takes the model over. Raises UserError for adapters that are no LoRA.
    """
    wrapped, reader = bitune.model, None
    kinds = [config for config in wrapped.peft_config.values() if type(config) is not LoraConfig]
    if kinds or any(config.use_dora for config in wrapped.peft_config.values()):
        raise UserError("bitune.adapter: only lora can be merged for decoding; expected lora")
    if bitune.variant.own:
        pair = [BIDIRECTIONAL, CAUSAL]
        wrapped.add_weighted_adapter(pair, [1.0, -1.0], DIFFERENCE, combination_type="cat")
        weights = get_peft_model_state_dict(wrapped, adapter_name=DIFFERENCE)
        config = wrapped.peft_config[DIFFERENCE]
    model = wrapped.merge_and_unload(adapter_names=[CAUSAL])
    if bitune.variant.own:
        shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
        copy = deepcopy(model, shared)  # other modules, the same weights
        reader = get_peft_model(copy, config, adapter_name=BIDIRECTIONAL)
        set_peft_model_state_dict(reader, weights, adapter_name=BIDIRECTIONAL)
    after = Bitune(model, bitune.name, bitune.theta_init, reader)
    after.take(bitune.theta())
    return after.requires_grad_(False).eval()
