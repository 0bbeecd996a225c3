"""Some layers look both ways and the others only back, against attention written out by hand."""

import json

import pytest
import torch
from builders import random_model, weights
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.bidirectional import (
    PADDINGS,
    attending,
    layer_leaks,
    prove_attention,
    set_attention,
    set_layers,
)
from ubmoe.config import BiSection, ModelSection, UserError
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.encoder.sentence_encoder import LayeredTransformer, as_encoder, load_saved, save_encoder
from ubmoe.layered import NAME, chosen, named_layers
from ubmoe.models.loading import load_model
from ubmoe.moe.export import encoder_attention, save_adapter

DEPTH = 4
FAMILIES = ["qwen2", "llama", "mistral", "qwen3", "qwen2_moe"]


def layered(layers, family="llama", **keys):
    model = set_layers(random_model(family, num_hidden_layers=DEPTH, **keys), layers)
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
    assert [named_layers(each) for each in ([2, 3, 4], [1, 3], [5])] == ["2-4", "1, 3", "5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_named_layers_look_both_ways(family):
    model = layered([1, 3], family)
    for padding in PADDINGS:
        looks = [leak > 1e-3 for leak in layer_leaks(model, padding)]
        assert looks == [False, True, False, True], padding
    assert "bidirectional in layers 1, 3, each verified" in prove_attention(model, True)
    with attending(model, bidirectional=False):
        assert not any(leak > 1e-6 for leak in layer_leaks(model))
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "layered_sdpa"


def test_a_layer_that_reads_otherwise_is_found_out():
    model = layered([1, 3])
    model.model.layers[1].self_attn.config = type(model.config)(is_causal=True)
    model.model.layers[1].self_attn.config._attn_implementation = "layered_sdpa"
    with pytest.raises(UserError, match="layer 1 of .* stays causal with none padding"):
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
        found = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for row, length in enumerate((9, 6)):
        torch.testing.assert_close(
            found.last_hidden_state[row, :length], expected[row, :length], atol=1e-5, rtol=1e-5
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


def test_layers_that_look_back_read_a_text_in_parts():
    model = layered("none")
    assert model.config._attn_implementation == NAME
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    cache = model(ids[:, :3], use_cache=True).past_key_values
    for start, end in ((3, 6), (6, 7)):
        part = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        assert torch.allclose(part.logits, whole[:, start:end], atol=1e-5)
        cache = part.past_key_values


def test_dependence_follows_the_layers_of_the_flow():
    """The last layer's queries and keys are of states that went through all the masks."""
    ids = torch.randint(97, (1, 30), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, model in {"some": layered([1]), "all": layered("all")}.items():
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        with observed(model) as recorder:
            found[name] = dependence_of(model, recorder, ids, torch.ones_like(ids))
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found["some"][:, 0], found["all"][:, 0])
    assert (found["some"][:, 2:] - found["all"][:, 2:]).abs().max() > 1e-4


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_a_saved_encoder_keeps_its_layers_and_is_the_base_to_language_models(
    tiny_path, tmp_path, pooling
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    base = load_model(ModelSection(name=str(tiny_path)))
    model = load_model(ModelSection(name=str(tiny_path)), True, {"from": 2})
    settings = BiSection(prompt=None, layers={"from": 2}, pooling=pooling)
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
    again = load_model(ModelSection(name=str(tmp_path / "bi")), bidirectional=True)
    assert [leak > 1e-3 for leak in layer_leaks(again)] == [False, False, True, True]


def test_the_adapter_of_an_encoder_keeps_its_layers(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    base = load_model(ModelSection(name=str(tiny_path)))
    model = load_model(ModelSection(name=str(tiny_path)), True, {"from": 2})
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
        found = saved.encode("The dog sleeps.", convert_to_tensor=True)
        torch.testing.assert_close(found, vectors, atol=1e-4, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(made).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base(ids).logits)


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
    found = encoder.encode(["The dog sleeps."], convert_to_tensor=True)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
