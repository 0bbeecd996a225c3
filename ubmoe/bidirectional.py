"""Make a causal language model bidirectional, and prove that it took effect.

Bidirectional is `config.is_causal = False` and nothing else: transformers >= 5.2 reads it in its
mask functions and saves it in config.json. Setting `self_attn.is_causal` on the layers, as the
paper's code does, is silently causal under eager and flex and in padded sdpa batches. So nothing is
believed: the last token is changed, and the first token's states are looked at.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ubmoe import layered
from ubmoe.config import Layers, UserError

Attention = Literal["causal", "bidirectional"]
PROOF_TOKENS = 8
SHORT = 3  # tokens of a window while it is proved
CANDIDATES = 64  # tokens that they are taken from
SIGHT = 1e-5  # relative change of a token in a layer that sees another: real models' is 5e-4
PADDINGS = ("none", "left", "right")
# Layers that read left to right whatever the mask says.
RECURRENT = ("linear_attention", "mamba", "mamba2", "recurrent", "conv")


def is_bidirectional(config: Any) -> bool:
    """Whether a model of this config (an object, or config.json as a dict) is bidirectional."""
    if isinstance(config, dict):
        return config.get("is_causal") is False
    return getattr(config, "is_causal", None) is False


def attention_name(config: Any) -> Attention:
    """The mask of a config as a word."""
    return "bidirectional" if is_bidirectional(config) else "causal"


def set_layers(
    model: PreTrainedModel, layers: Layers, keep_sink: bool = False, section: str = "bi"
) -> PreTrainedModel:
    """Write into the config which layers may be bidirectional, and whether the first token stays
    causal. Raises UserError, naming the section's key.

    `all` and false leave what a saved encoder says of itself.
    """
    config = model.config.get_text_config()
    numbers = layered.chosen(layers, config.num_hidden_layers, f"{section}.layers")
    for settings in (model.config, config):
        if numbers is not None:
            setattr(settings, layered.KEY, numbers)
        if keep_sink:
            setattr(settings, layered.SINK, True)
    return model


def make_bidirectional(
    model: PreTrainedModel, layers: Layers = "all", keep_sink: bool = False
) -> PreTrainedModel:
    """Let every token of these layers see every other one, and prove it, as `ubmoe` documents."""
    for config in (model.config, model.config.get_text_config()):
        for name in (layered.KEY, layered.SINK):  # of an earlier mask
            vars(config).pop(name, None)
    set_layers(model, layers, keep_sink)
    set_attention(model, bidirectional=True)
    prove_attention(model, bidirectional=True)
    return model


def set_attention(model: PreTrainedModel, bidirectional: bool) -> PreTrainedModel:
    """Write `is_causal` into the config (a composite model's text config too): it is saved."""
    ours = layered.is_ours(model.config.get_text_config())
    layered.switch(model, on=bidirectional and ours)  # first: it may refuse
    for config in {
        id(settings): settings for settings in (model.config, model.config.get_text_config())
    }.values():
        config.is_causal = not bidirectional
    return model


@contextmanager
def attending(model: PreTrainedModel, bidirectional: bool) -> Iterator[PreTrainedModel]:
    """The model under a mask that ends with the block; the one before it comes back."""
    before = is_bidirectional(model.config)
    set_attention(model, bidirectional)
    try:
        yield model
    finally:
        set_attention(model, before)


@contextmanager
def masked(
    model: PreTrainedModel, bidirectional: bool, keys: dict[str, Any]
) -> Iterator[PreTrainedModel]:
    """As `attending`, with these keys of `layered` alone; those before it come back, too."""
    config = vars(model.config.get_text_config())
    names = (layered.KEY, layered.SINK)
    before = {name: config.pop(name) for name in names if name in config}
    config.update(keys)
    try:
        with attending(model, bidirectional):
            yield model
    finally:
        for name in names:
            config.pop(name, None)
        config.update(before)
        set_attention(model, is_bidirectional(model.config))


def prove_attention(model: PreTrainedModel, bidirectional: bool, windows: bool = True) -> str:
    """Check that a changed last token moves the first token's states exactly when it should.

    windows: also that each layer sees as far as its window says. Returns a line for the log;
    raises UserError where the model reads otherwise.
    """
    family = f"{type(model).__name__} ({model.config._attn_implementation})"
    recurrent = sorted(
        set(getattr(model.config.get_text_config(), "layer_types", None) or ()) & set(RECURRENT)
    )
    if bidirectional and recurrent:
        raise UserError(
            f"{family} has {', '.join(recurrent)} layers, which read left to right; it cannot be "
            "bidirectional"
        )
    if bidirectional and getattr(model.config, "use_bidirectional_attention", None):
        raise UserError(
            f"{family} is bidirectional by use_bidirectional_attention, with windows of its own; "
            "expected a decoder"
        )
    if windows:
        _prove_windows(model, family, bidirectional)
    if bidirectional and layered.is_ours(model.config.get_text_config()):
        return _prove_ours(model, family)
    for padding in PADDINGS:
        moved = _finite(leak(model, padding), family, padding)
        if bidirectional and moved <= tolerance(model):
            raise UserError(
                f"{family} stays causal with {padding} padding although is_causal is false; it "
                "cannot be bidirectional"
            )
        if not bidirectional and moved > tolerance(model):
            raise UserError(
                f"{family} sees later tokens with {padding} padding; expected a causal language "
                "model (a decoder)"
            )
    mode = "bidirectional" if bidirectional else "causal"
    return f"attention {mode}, verified on {family} with no, left and right padding"


def _prove_ours(model: PreTrainedModel, family: str) -> str:
    """The same for a mask of ours: layer by layer, token by token."""
    config = model.config.get_text_config()
    layers, sink = layered.partial_layers(config), layered.keeps_sink(config)
    for padding in PADDINGS:
        for number, moves in enumerate(layer_sights(model, padding)[:, :-1, 1].tolist()):
            for token, moved in enumerate(moves):
                sees = (layers is None or number in layers) and not (sink and token == 0)
                bound = SIGHT if sees else tolerance(model)
                if (_finite(moved, family, padding) > bound) != sees:
                    word = "stays causal" if sees else "sees later tokens"
                    raise UserError(
                        f"token {token} in layer "
                        f"{number} of {family} {word} with {padding} padding; expected "
                        "layers: all and keep_sink: false"
                    )
        if sink:
            _prove_sink(model, family, padding)
    where = "" if layers is None else f" in layers {layered.named_layers(layers)}"
    kept = " but for the first token, whose states are the causal ones" if sink else ""
    return (
        f"attention bidirectional{where}{kept}, verified layer by layer on {family} with no, left "
        "and right padding"
    )


def _prove_sink(model: PreTrainedModel, family: str, padding: str) -> None:
    """The first token's states after every layer are those under the causal mask."""
    *others, one, another = _unlike(model)
    with attending(model, bidirectional=False):
        causal = _first_states(model, padding, [*others, one])
    for last in (one, another):
        moved = _distance(causal, _first_states(model, padding, [*others, last]))
        if _finite(moved, family, padding) > tolerance(model):
            raise UserError(
                f"the first token's states of {family} are not the causal ones with "
                f"{padding} padding; expected keep_sink: false"
            )


def _prove_windows(model: PreTrainedModel, family: str, bidirectional: bool) -> None:
    """Raises UserError unless every layer of a model with windows sees as far as its mask says.

    Kinds of layers may differ, and tokens beyond a window: layer by layer, on shorter windows.
    """
    config = model.config.get_text_config()
    if not hasattr(model.base_model, "layers") or getattr(config, "num_kv_shared_layers", None):
        return
    some = layered.partial_layers(config)
    with _short_windows(model) as window:
        places = torch.arange((window or 0) + SHORT)
        # a config without kinds of layers may name a window that the class does not have
        reaches: dict[str | None, list[int | None]] = {None: [window, None]}
        reaches |= {"sliding_attention": [window], "full_attention": [None]}
        for padding in PADDINGS if window else ():
            for number, moved in enumerate(layer_sights(model, padding, len(places))):
                _finite(moved.max().item(), family, padding)
                kinds: Any = getattr(config, "layer_types", None)
                kind = kinds[number] if kinds else None
                causal = not (bidirectional and (some is None or number in some))
                masks = [
                    layered.visible(places[:, None], places[[0, -1]], causal, reach)
                    for reach in reaches.get(kind, [])
                ]
                for mask in masks if layered.keeps_sink(config) else []:
                    mask[0, 1] = False  # the first token sees itself alone
                if kind in reaches and not any(_is_of(moved, mask, model) for mask in masks):
                    word = "causal" if causal else "bidirectional"
                    raise UserError(
                        f"layer {number} ({kind or 'attention'}) of {family} sees other tokens "
                        f"than its {word} mask and its window say, with {padding} padding; "
                        "expected another model.attn_implementation"
                    )


def _is_of(moved: torch.Tensor, seen: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether tokens moved, (T, 2), where the first and the last one are seen, and nowhere else.

    What is not seen changes nothing but by rounding; what is seen may change little, and in half
    precision some of it nothing.
    """
    others = seen.clone()
    others[0, 0] = others[-1, 1] = False  # they themselves
    reached = (moved > 0) & others
    whole = reached if model.dtype == torch.float32 else reached.any(0)
    expected = others if model.dtype == torch.float32 else others.any(0)
    return whole.equal(expected) and bool((moved[~seen] <= tolerance(model)).all())


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[int | None]:
    """Inside, windows are of SHORT tokens at most; yields that, or None for a model without."""
    holders: list[Any] = [model.config.get_text_config(), *model.base_model.modules()]
    named = ((holder, getattr(holder, "sliding_window", None)) for holder in holders)
    windows = [(holder, size) for holder, size in named if isinstance(size, int) and size > 0]
    for holder, size in windows:
        holder.sliding_window = min(size, SHORT)
    try:
        yield min((SHORT, *(size for _, size in windows))) if windows else None
    finally:
        for holder, size in windows:
            holder.sliding_window = size


@torch.no_grad()
def layer_sights(
    model: PreTrainedModel, padding: str = "none", count: int | None = None
) -> torch.Tensor:
    """(L, T, 2) how far each layer alone moves each of T tokens when the input of the first or of
    the last changes; the most of two texts, as one may hardly attend.

    count: T; None: as many as are proved elsewhere, no more than a sliding window shows.
    """
    distances: list[torch.Tensor] = []
    start, count = 3 if padding == "left" else 0, count or _proof_length(model)
    real = slice(start, start + count)

    def look(layer: Any, arguments: tuple[Any, ...], keys: dict[str, Any], output: Any) -> None:
        states, *rest = arguments
        one, moved = _states(output)[0, real].float(), []
        for place in (start, start + count - 1):
            changed = states.clone()
            changed[:, place] = states[:, place].roll(1, dims=-1) - states[:, place]
            other = _states(layer.forward(changed, *rest, **keys))[0, real].float()
            moved.append((one - other).abs().amax(-1) / one.abs().amax(-1))
        distances.append(torch.stack(moved, 1).cpu())

    inner: Any = model.base_model
    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in inner.layers]
    try:
        for tokens in (_unlike(model), _unlike(model)[::-1]):
            _first_states(model, padding, tokens, count)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(distances).unflatten(0, (2, -1)).amax(0)


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _finite(moved: float, family: str, padding: str) -> float:
    """No comparison with NaN is true, so that nothing would be proved by it.

    torch 2.13 compiles flex_attention for processors without AVX-512 so that it gives NaN.
    """
    if not math.isfinite(moved):
        raise UserError(
            f"{family} gives states that are not finite with {padding} padding; expected another "
            "model.attn_implementation or model.dtype"
        )
    return moved


def tolerance(model: PreTrainedModel) -> float:
    """Relative change that is rounding; equal shapes are bit-equal, save where experts regroup."""
    return max(1e-5, 2 * torch.finfo(model.dtype).eps)


@torch.no_grad()
def leak(model: PreTrainedModel, padding: str = "none") -> float:
    """How far the first token's states move when the last token changes.

    The most of any layer, relative to its largest value, on no more tokens than a sliding window
    shows.
    """
    *others, one, another = _unlike(model)
    first, second = (_first_states(model, padding, [*others, last]) for last in (one, another))
    return _distance(first, second)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """(layers + 1, D) each: the largest difference of any layer, relative to its largest value."""
    scale = one.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((one - other).abs().amax(-1) / scale).max().item()


def _unlike(model: PreTrainedModel) -> list[int]:
    """Tokens from all over the vocabulary, and last the two of them that are least alike.

    Neighbours will not do: a vocabulary's first tokens may be bytes that were never trained, which
    are all alike.
    """
    embeddings: Any = model.get_input_embeddings()
    tokens = torch.linspace(0, embeddings.weight.shape[0] - 1, CANDIDATES).long()
    rows = embeddings.weight[tokens.to(embeddings.weight.device)].float()
    pair = divmod(int(torch.cdist(rows, rows).argmax()), CANDIDATES)
    return tokens[[*range(0, CANDIDATES, CANDIDATES // PROOF_TOKENS), *pair]].tolist()


def _proof_length(model: PreTrainedModel) -> int:
    """Tokens that a proof reads: no more than a sliding window shows."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return min(PROOF_TOKENS, window or PROOF_TOKENS)


@torch.no_grad()
def _first_states(
    model: PreTrainedModel, padding: str, tokens: list[int], length: int | None = None
) -> torch.Tensor:
    """(layers + 1, D) in fp32: the first real token's states; length: None, a window's at most."""
    length = length or _proof_length(model)
    ids = torch.tensor(tokens[-length:])
    real = torch.ones(length, dtype=torch.long)
    pad = torch.zeros(3 if padding != "none" else 0, dtype=torch.long)
    order = (pad, real) if padding == "left" else (real, pad)
    row = (pad, ids) if padding == "left" else (ids, pad)
    output = model.base_model(
        input_ids=torch.cat(row)[None].to(model.device),
        attention_mask=torch.cat(order)[None].to(model.device),
        use_cache=False,
        output_hidden_states=True,
    )
    first = len(pad) if padding == "left" else 0
    return torch.stack([state[0, first].float() for state in output.hidden_states])
