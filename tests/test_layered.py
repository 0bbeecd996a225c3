"""Masks of our own, some layers and the first token kept, against attention written by hand."""

import json

import pytest
import torch
from builders import random_model, weights
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe import layered as masks
from ubmoe.bidirectional import (
    PADDINGS,
    attending,
    layer_sights,
    prove_attention,
    set_attention,
    set_layers,
)
from ubmoe.config import BiSection, ModelSection, UserError
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.encoder.sentence_encoder import LayeredTransformer, as_encoder, load_saved, save_encoder
from ubmoe.layered import NAME, chosen, named_layers
from ubmoe.models.loading import load_model
from ubmoe.models.source import ModelSource
from ubmoe.moe.export import encoder_attention, save_adapter, save_mixture, save_modes
from ubmoe.moe.routes import set_route

DEPTH = 4
FIRST_ALONE = masks.first_alone
# By family: what of it the mask must respect. Gemma 3 has a window in its first layers alone.
KEPT = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "gemma3_text": {"sliding_window": 3, "sliding_window_pattern": 3},
}
FAMILIES = ["qwen2", "llama", "mistral", "qwen3", "qwen2_moe"]


def layered(layers, family="llama", keep_sink=False, **keys):
    model = set_layers(random_model(family, num_hidden_layers=DEPTH, **keys), layers, keep_sink)
    return set_attention(model, bidirectional=True)


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", None),
        ("none", []),
        ({"from": 1}, [1, 2, 3]),
        ({"from": 0}, None),
        ({"to": 1}, [0, 1]),
        ({"every": 2}, [0, 2]),
        ({"every": 2, "from": 1}, [1, 3]),
        ([3, 1], [1, 3]),
    ],
)
def test_layers_are_named_in_words(layers, numbers):
    assert chosen(layers, DEPTH) == numbers


@pytest.mark.parametrize("layers", [{"from": 4}, [0, 4], [-1], {"from": 3, "to": 1}])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UserError, match="bi.layers: got .*; expected some of the layers 0 to 3"):
        chosen(layers, DEPTH)


def test_the_names_of_layers_are_short():
    assert [named_layers(item) for item in ([2, 3, 4], [1, 3], [5])] == ["2-4", "1, 3", "5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_named_layers_are_bidirectional(family):
    model = layered([1, 3], family)
    for padding in PADDINGS:
        looks = (layer_sights(model, padding)[:, :-1, 1] > 1e-4).tolist()
        assert looks == [[sees] * 7 for sees in (False, True, False, True)], padding
    assert "bidirectional in layers 1, 3, verified layer by layer" in prove_attention(model, True)
    with attending(model, bidirectional=False):
        assert layer_sights(model)[:, :-1, 1].max() < 1e-6
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "layered_sdpa"


def test_a_layer_that_reads_otherwise_is_found_out():
    model = layered([1, 3])
    model.model.layers[1].self_attn.config = type(model.config)(is_causal=True)
    model.model.layers[1].self_attn.config._attn_implementation = "layered_sdpa"
    with pytest.raises(UserError, match="token 0 in layer 1 of .* stays causal with none"):
        prove_attention(model, bidirectional=True)


@pytest.mark.parametrize("family", FAMILIES[:4])
@pytest.mark.parametrize("window", [None, 3])
def test_states_are_those_of_masks_written_out(family, window):
    """Eager attention under stock masks, the model cut into its layers: one mask a layer."""
    keys = {"sliding_window": window} if window and family == "mistral" else {}
    if window and family != "mistral":
        keys = {"sliding_window": window, "use_sliding_window": True}
        if family == "llama":
            pytest.skip("Llama has no window")
        keys["layer_types"] = ["sliding_attention"] * DEPTH
    model, stock = (
        layered({"from": 2}, family, **keys),
        random_model(family, num_hidden_layers=DEPTH, **keys),
    )
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    kept = {}
    for causal in (True, False):
        set_attention(stock, bidirectional=not causal)

        def keep(layer, arguments, given, causal=causal):
            kept.setdefault(causal, (arguments[1:], given))

        hook = stock.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            states = stock.model(input_ids=ids, attention_mask=mask, use_cache=False)
        hook.remove()
    with torch.no_grad():
        states = stock.model.embed_tokens(ids)
        for number, layer in enumerate(stock.model.layers):
            rest, given = kept[number < 2]
            states = layer.forward(states, *rest, **given)
        expected = stock.model.norm(states)
        actual = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for row, length in enumerate((9, 6)):
        torch.testing.assert_close(
            actual.last_hidden_state[row, :length], expected[row, :length], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_a_text_says(side):
    model = layered([0, 2])
    ids = torch.arange(5, 15)[None]
    pad = torch.zeros(1, 4, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    masks = (pad, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), pad)
    real = slice(4, 14) if side == "left" else slice(0, 10)
    mask = torch.cat(masks, 1)
    with torch.no_grad():
        alone = model.model(ids).last_hidden_state
        together = model.model(
            torch.cat(parts, 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        ).last_hidden_state[:, real]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_causal_layers_read_a_text_in_parts():
    model = layered("none")
    assert model.config._attn_implementation == NAME
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    cache = model(ids[:, :3], use_cache=True).past_key_values
    for start, end in ((3, 6), (6, 7)):
        part = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        assert torch.allclose(part.logits, whole[:, start:end], atol=1e-5)
        cache = part.past_key_values


@pytest.mark.parametrize("keep_sink", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_dependence_follows_the_mask_of_the_flow(family, keep_sink):
    """The last layer's queries and keys are of states that went through all the masks."""
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    left = torch.ones_like(ids)
    left[1, :9] = 0
    actual = {}
    for name, layers in {"some": [1], "all": "all"}.items():
        model = layered(layers, family, keep_sink, **KEPT[family])
        for mask in (left, left.flip(1), torch.ones_like(ids)):
            with torch.no_grad():
                expected = model(ids, attention_mask=mask, use_cache=False).logits
            with observed(model) as recorder, torch.no_grad():
                logits = model(ids, attention_mask=mask, use_cache=False).logits
                actual[name] = dependence_of(model, recorder, ids, torch.ones_like(ids))
            kept = mask.bool()
            torch.testing.assert_close(logits[kept], expected[kept], atol=1e-4, rtol=1e-4)
    assert torch.equal(actual["some"][:, 0], actual["all"][:, 0])
    assert (actual["some"][:, 2:] - actual["all"][:, 2:]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("pooling", "mask", "looks"),
    [
        ("mean", ({"from": 2}, False), [[False] * 2] * 2 + [[True] * 2] * 2),
        ("weighted_mean", ({"from": 2}, True), [[False] * 2] * 2 + [[False, True]] * 2),
        ("mean", ("all", True), [[False, True]] * 4),
    ],
)
def test_a_saved_encoder_keeps_its_mask_and_is_the_base_to_language_models(
    tiny_path, tmp_path, pooling, mask, looks
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    base = load_model(ModelSection(name=str(tiny_path)))
    model = load_model(ModelSection(name=str(tiny_path)), True, *mask)
    settings = BiSection(prompt=None, layers=mask[0], keep_sink=mask[1], pooling=pooling)
    encoder = as_encoder(model, tokenizer, settings)
    texts = ["The dog sleeps.", "Anna eats bread in the garden."]
    vectors = encoder.encode(texts, convert_to_tensor=True)
    whole = as_encoder(load_model(ModelSection(name=str(tiny_path)), True), tokenizer, settings)
    assert (whole.encode(texts, convert_to_tensor=True) - vectors).abs().max() > 1e-2
    save_encoder(encoder, model, tokenizer, settings, tmp_path / "bi")
    modules = json.loads((tmp_path / "bi" / "modules.json").read_text())
    assert modules[0]["type"] == "ubmoe.encoder.sentence_encoder.LayeredTransformer"
    with pytest.raises(ValueError, match="LayeredTransformer"):
        SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    for stock in (
        SentenceTransformer(str(tmp_path / "bi"), device="cpu", trust_remote_code=True),
        load_saved(str(tmp_path / "bi"), "cpu"),
    ):
        assert isinstance(stock[0], LayeredTransformer)
        torch.testing.assert_close(stock.encode(texts, convert_to_tensor=True), vectors)
    assert encoder_attention(tmp_path / "bi") == "bidirectional"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "bi").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base(ids).logits)
    saved = ModelSection(name=str(tmp_path / "bi"))
    assert ModelSource.of(saved).attention == "bidirectional"
    again = load_model(saved, bidirectional=True)
    assert (layer_sights(again)[:, :2, 1] > 1e-4).tolist() == looks
    assert ("the first token sees itself alone" in (tmp_path / "bi" / "README.md").read_text()) == (
        mask[1]
    )


def test_gradients_are_the_same_where_activations_are_computed_again():
    ids, real = padded("left")
    actual = []
    for checkpointing in (False, True):
        model = layered([0, 1, 3], keep_sink=True).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        states = model.model(input_ids=ids, attention_mask=real, use_cache=False)
        states.last_hidden_state[real.bool()].square().sum().backward()
        actual.append([value.grad for value in model.model.parameters()])
    torch.testing.assert_close(*actual)


def test_the_two_modes_and_the_mixture_of_an_encoder_keep_its_sink(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    base = load_model(ModelSection(name=str(tiny_path)))
    model = load_model(ModelSection(name=str(tiny_path)), True, "all", keep_sink=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1.2
    settings = BiSection(prompt=None, keep_sink=True)
    encoder = as_encoder(model, tokenizer, settings)
    save_encoder(encoder, model, tokenizer, settings, tmp_path / "bi")
    vectors = encoder.encode("The dog sleeps.", convert_to_tensor=True)
    for save in (save_modes, save_mixture):
        save(*weights(base, model), tokenizer, tmp_path / "bi", tmp_path / "made", "")
        saved = load_saved(str(tmp_path / "made"), "cpu")
        if save is save_mixture:
            set_route(saved[0].model, "bi")
        actual = saved.encode("The dog sleeps.", convert_to_tensor=True)
        torch.testing.assert_close(actual, vectors, atol=1e-5, rtol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
        if save is save_modes:
            ids = torch.arange(40)[None]
            with torch.no_grad():
                assert torch.equal(plain(ids).logits, base(ids).logits)


@pytest.mark.parametrize("mask", [({"from": 2}, False), ("all", True)])
def test_the_adapter_of_an_encoder_keeps_its_mask(tiny_path, tmp_path, mask):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    base = load_model(ModelSection(name=str(tiny_path)))
    model = load_model(ModelSection(name=str(tiny_path)), True, *mask)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1.2
    encoder = as_encoder(model, tokenizer, BiSection(prompt=None))
    save_encoder(encoder, model, tokenizer, BiSection(prompt=None), tmp_path / "bi")
    bi, made = tmp_path / "bi", tmp_path / "adapter"
    save_adapter(*weights(base, model), tokenizer, bi, made, "", rank=model.config.hidden_size)
    vectors = encoder.encode("The dog sleeps.", convert_to_tensor=True)
    for saved in (
        SentenceTransformer(str(made), device="cpu", trust_remote_code=True),
        load_saved(str(made), "cpu"),
    ):
        actual = saved.encode("The dog sleeps.", convert_to_tensor=True)
        torch.testing.assert_close(actual, vectors, atol=1e-4, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(made).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base(ids).logits)


# --- the sink that is kept ------------------------------------------------------------------------

REAL = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] + [0] * 8])
TEXTS = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(3))


def padded(side):
    """(ids, mask) of three texts of 9, 6 and 1 tokens."""
    order = REAL if side == "right" else REAL.flip(1)
    return TEXTS, order


def written(real, bidirectional, window, queries=None):
    """(B, 1, Q, T) the mask of a layer with the sink kept, by the plainest loop; True: sees."""
    texts, tokens = real.shape
    mask = torch.zeros(texts, 1, tokens, tokens, dtype=torch.bool)
    for text in range(texts):
        first = real[text].tolist().index(1)
        for row in range(tokens):
            for column in range(tokens):
                near = window is None or abs(row - column) <= window - (column <= row)
                if bidirectional:
                    near = window is None or abs(row - column) <= window
                sees = near and (bidirectional or column <= row) and bool(real[text, column])
                if row == first and bidirectional:
                    sees = column == first
                mask[text, 0, row, column] = sees or row == column
    return mask[:, :, tokens - (queries or tokens) :]


def by_hand(stock, ids, real, layers, **keys):
    """Last states of stock eager attention, each layer under its written mask, added."""
    stock.set_attn_implementation("eager")
    hooks = []
    for number, layer in enumerate(stock.model.layers):
        window = getattr(layer.self_attn, "sliding_window", None)
        seen = written(real, number in layers, window, ids.shape[1])
        added = torch.zeros(seen.shape, dtype=stock.dtype)
        added = added.masked_fill(~seen, torch.finfo(stock.dtype).min)

        def change(layer, arguments, given, added=added):
            return arguments, given | {"attention_mask": added}

        hooks.append(layer.register_forward_pre_hook(change, with_kwargs=True))
    actual = stock.model(input_ids=ids, attention_mask=real, **keys)
    for hook in hooks:
        hook.remove()
    return actual


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", ["all", [1, 3]])
@pytest.mark.parametrize("family", KEPT)
def test_states_and_gradients_with_the_sink_kept_are_those_of_masks_written_out(
    family, layers, backend, side
):
    model = random_model(family, num_hidden_layers=DEPTH, **KEPT[family])
    stock = random_model(family, num_hidden_layers=DEPTH, **KEPT[family])
    model.set_attn_implementation(backend)
    set_attention(set_layers(model, layers, keep_sink=True), bidirectional=True)
    ids, real = padded(side)
    ours = model.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
    numbers = range(DEPTH) if layers == "all" else layers
    theirs = by_hand(stock, ids, real, numbers, use_cache=False).last_hidden_state
    kept = real.bool()
    torch.testing.assert_close(ours[kept], theirs[kept], atol=5e-5, rtol=1e-4)
    weights = torch.randn(ours[kept].shape, generator=torch.Generator().manual_seed(1))
    for states in (ours, theirs):
        (states[kept] * weights).sum().backward()
    inner = zip(model.model.named_parameters(), stock.model.parameters(), strict=True)
    for (name, one), other in inner:
        scale = other.grad.abs().max().clamp_min(1)
        torch.testing.assert_close(
            one.grad / scale, other.grad / scale, atol=2e-4, rtol=1e-3, msg=name
        )


@pytest.mark.parametrize("family", KEPT)
def test_the_sink_is_kept_in_bfloat16(family):
    model = layered("all", family, keep_sink=True, **KEPT[family]).to(torch.bfloat16)
    stock = random_model(family, num_hidden_layers=DEPTH, **KEPT[family]).to(torch.bfloat16)
    ids, real = padded("right")
    with torch.no_grad():
        ours = model.model(input_ids=ids, attention_mask=real, use_cache=False)
        theirs = by_hand(stock, ids, real, range(DEPTH), use_cache=False)
    one, other = (item.last_hidden_state[real.bool()].float() for item in (ours, theirs))
    assert (one - other).abs().mean() < 0.03 * other.abs().mean()
    assert "but for the first token" in prove_attention(model, bidirectional=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*KEPT, "qwen2_moe", "qwen3", "mistral"])
def test_the_first_tokens_states_are_the_causal_ones_bit_for_bit(family, side, dtype, dropout):
    """Attention dropout would drop that token's only key, and its whole row."""
    ids, real = padded(side)
    inputs = {"input_ids": ids, "attention_mask": real, "output_hidden_states": True}
    actual = []
    for model in (
        random_model(family, num_hidden_layers=DEPTH, **KEPT.get(family, {})),
        layered("all", family, keep_sink=True, **KEPT.get(family, {})),
    ):
        model.to(dtype)
        if actual and dropout:
            model.train()
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = dropout
        with torch.no_grad():
            states = model.model(**inputs, use_cache=False).hidden_states
        first = real.argmax(1)
        actual.append(torch.stack(states)[:, torch.arange(3), first])
        others = torch.stack(states)[:, 0, -1 if side == "left" else 1]
        actual.append(others)
    moe = family == "qwen2_moe"  # experts regroup the tokens, and round otherwise
    torch.testing.assert_close(actual[0], actual[2], rtol=1e-2 * moe, atol=1e-2 * moe)
    assert dropout or side == "left" or (actual[1] - actual[3]).abs().max() > 1e-3


@pytest.mark.parametrize("family", KEPT)
def test_a_batch_with_the_sink_kept_says_what_each_text_says(family):
    model = layered([0, 2], family, keep_sink=True, **KEPT[family])
    for side in ("left", "right"):
        ids, real = padded(side)
        places = (real.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            together = model.model(
                input_ids=ids, attention_mask=real, position_ids=places, use_cache=False
            ).last_hidden_state
            for row, kept in enumerate(real.bool()):
                alone = model.model(ids[row, kept][None], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(alone, together[row, kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_in_parts_keeps_the_sink_where_its_first_token_is(side):
    """On the left the third text begins in the second part alone."""
    model, stock = layered("all", keep_sink=True), random_model("llama", num_hidden_layers=DEPTH)
    ids, real = padded(side)
    caches = [None, None]
    for start, end in ((0, 4), (4, 9)):
        seen = real[:, :end]
        if start == 0 and side == "left":
            seen = seen.clone()
            seen[2] = 1  # nothing but padding: no text to compare
        keys = {"use_cache": True, "position_ids": torch.arange(start, end)[None]}
        if start:
            seen = real
        with torch.no_grad():
            ours = model.model(
                input_ids=ids[:, start:end], attention_mask=seen, past_key_values=caches[0], **keys
            )
            theirs = by_hand(
                stock, ids[:, start:end], seen, range(DEPTH), past_key_values=caches[1], **keys
            )
        caches = [ours.past_key_values, theirs.past_key_values]
        kept = real[:, start:end].bool()
        torch.testing.assert_close(
            ours.last_hidden_state[kept], theirs.last_hidden_state[kept], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("layers", ["all", [1, 2]])
def test_the_proof_looks_at_every_layer_and_token(layers):
    model = layered(layers, "qwen2", keep_sink=True)
    numbers = range(DEPTH) if layers == "all" else layers
    for padding in PADDINGS:
        looks = (layer_sights(model, padding)[:, :-1, 1] > 1e-5).tolist()
        assert looks == [[False, *[number in numbers] * 6] for number in range(DEPTH)]
    where = "" if layers == "all" else " in layers 1, 2"
    said = f"attention bidirectional{where} but for the first token, whose states are the causal"
    assert said in prove_attention(model, bidirectional=True)
    with attending(model, bidirectional=False):
        assert "causal, verified" in prove_attention(model, bidirectional=False)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda output, value, padding: output, "token 0 in layer 0 of .* sees later tokens"),
        (
            lambda output, value, padding: value.transpose(1, 2).repeat_interleave(2, 2),
            "token 1 in layer 0 of .* stays causal with none padding",
        ),
        (
            lambda output, value, padding: torch.cat((0 * output[:, :1], output[:, 1:]), 1),
            "the first token's states of .* are not the causal ones with none padding",
        ),
        (
            lambda output, value, padding: FIRST_ALONE(output, value, None),
            "token 0 in layer 0 of .* sees later tokens with left padding",
        ),
    ],
)
def test_a_sink_that_is_not_kept_is_found_out(monkeypatch, broken, said):
    model = layered("all", keep_sink=True)
    monkeypatch.setattr(masks, "first_alone", broken)
    with pytest.raises(UserError, match=f"{said}.*expected .*keep_sink: false"):
        prove_attention(model, bidirectional=True)


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [
        ("gpt_oss", "GptOss", {"num_local_experts": 4}),  # sinks that are weights
        ("gemma2", "Gemma2", {}),  # a soft cap
        ("gpt2", "GPT2", {}),
    ],
)
@pytest.mark.parametrize("mask", [("all", True), ([1], False)])
def test_attention_that_is_no_plain_softmax_is_refused(family, name, sizes, mask):
    model = set_layers(random_model(family, **sizes), *mask)
    with pytest.raises(UserError, match=f"^{name}.* no mask of ours.*; expected layers: all and"):
        set_attention(model, bidirectional=True)


def test_weights_of_the_weighted_mean_are_the_positions(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = load_model(ModelSection(name=str(tiny_path)))
    settings = BiSection(prompt=None, attention="causal", pooling="weighted_mean")
    encoder = as_encoder(model, tokenizer, settings)
    ids = torch.tensor([tokenizer("The dog sleeps.")["input_ids"]])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    places = torch.arange(1, len(states) + 1)[:, None]
    expected = (states * places).sum(0) / places.sum()
    actual = encoder.encode(["The dog sleeps."], convert_to_tensor=True)[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
