"""Bidirectional attention takes effect on every family, backend and padding, or is refused."""

import re

import pytest
import torch
from builders import FAMILIES, random_model
from transformers import AutoModelForCausalLM

from ubmoe import bidirectional
from ubmoe.bidirectional import (
    PADDINGS,
    leak,
    make_bidirectional,
    prove_attention,
    set_attention,
    tolerance,
)
from ubmoe.config import UserError

BACKENDS = {
    family: ["eager"] if family == "gemma2" else ["eager", "sdpa"] for family in FAMILIES
}  # gemma2's softcap is beyond sdpa


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_and_padding_reads_as_asked(family):
    for backend in BACKENDS[family]:
        model = random_model(family)
        model.set_attn_implementation(backend)
        # zero, but for experts: they regroup the tokens, and another shape rounds otherwise
        assert all(leak(model, padding) < 1e-6 for padding in PADDINGS)
        assert "causal, verified" in prove_attention(model, bidirectional=False)
        make_bidirectional(model)
        assert all(leak(model, padding) > 1e-3 for padding in PADDINGS)


@pytest.fixture
def flexible():
    model = random_model("qwen2", head_dim=16, hidden_size=64)
    model.set_attn_implementation("flex_attention")
    return model


def test_flex_attention_reads_as_asked(flexible):
    with torch.compiler.set_stance("force_eager"):
        said = prove_attention(flexible, False)
        assert "causal, verified on Qwen2ForCausalLM (flex" in said
        assert max(leak(flexible, padding) for padding in PADDINGS) < 1e-6
        assert min(leak(make_bidirectional(flexible), padding) for padding in PADDINGS) > 1e-3


@pytest.mark.slow
def test_compiled_flex_attention_reads_as_asked_or_is_refused(flexible, monkeypatch):
    """With one padding and one mask: each is compiled anew, for many seconds."""
    monkeypatch.setattr(bidirectional, "PADDINGS", ("left",))
    try:
        prove_attention(flexible, False)
    except UserError as refused:  # compiled for some processors it is wrong, each time otherwise
        wrong = r"\(flex_attention\) (gives states that are not finite|sees later tokens) with left"
        assert re.search(wrong, str(refused))
        assert not leak(flexible, "left") < 1e-6
        return
    assert leak(flexible, "left") < 1e-6


@pytest.mark.parametrize("bidirectional", [False, True])
def test_states_that_are_not_finite_prove_nothing(bidirectional):
    model = make_bidirectional(random_model("llama")) if bidirectional else random_model("llama")
    model.model.layers[0].self_attn.o_proj.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="states that are not finite with none padding"):
        prove_attention(model, bidirectional)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_is_saved_with_the_model(family, tmp_path):
    make_bidirectional(random_model(family)).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.is_causal is False
    prove_attention(again, bidirectional=True)
    as_language_model = AutoModelForCausalLM.from_pretrained(tmp_path, is_causal=True).eval()
    prove_attention(as_language_model, bidirectional=False)


def test_padding_does_not_change_what_a_bidirectional_model_says():
    model = make_bidirectional(random_model("qwen2"))
    ids = torch.arange(5, 15)[None]
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), 1)
    mask = (torch.arange(14) < 10).long()[None]
    with torch.no_grad():
        alone = model(ids).logits
        together = model(padded, attention_mask=mask).logits[:, :10]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["stablelm", "gpt_neo", "mamba"])
def test_families_that_stay_causal_are_refused_by_name(family):
    sizes = {
        "stablelm": {"head_dim": 8},
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "mamba": {"state_size": 4},
    }[family]
    model = random_model(family, **sizes)
    with pytest.raises(UserError, match=type(model).__name__ + ".*cannot be bidirectional"):
        make_bidirectional(model)


def test_a_causal_layer_flag_alone_is_found_out():
    """What the paper's code does: the flag of the layers, not of the config."""
    model = random_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="with left padding"):
        model.config.is_causal = True
        del model.config.is_causal
        prove_attention(model, bidirectional=True)


def test_a_bidirectional_model_is_no_decoder():
    model = set_attention(random_model("qwen2"), bidirectional=True)
    with pytest.raises(UserError, match="sees later tokens.*expected a causal language model"):
        prove_attention(model, bidirectional=False)


@pytest.mark.parametrize("window", [3, 16])
def test_a_window_is_proved_within_its_reach(window):
    model = random_model("mistral", sliding_window=window)
    assert "causal, verified" in prove_attention(model, bidirectional=False)
    assert leak(model) < 1e-6 < 1e-3 < leak(make_bidirectional(model))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layer", [2, 3])  # one with a window, one without
def test_a_layer_of_another_kind_than_its_config_says_is_found_out(layer, bidirectional):
    """A window of 512 hides nothing of a short proof; the first layers read as they should."""
    model = random_model("gemma3_text", num_hidden_layers=4, sliding_window=512)
    set_attention(model, bidirectional)
    said = prove_attention(model, bidirectional)
    kinds = dict(enumerate(model.config.layer_types))
    masks = {}

    def keep(module, arguments, keys):
        masks[module] = keys["attention_mask"]

    def swapped(module, arguments, keys):
        return arguments, keys | {"attention_mask": masks[model.model.layers[1 - layer % 2]]}

    for item in model.model.layers[:2]:
        item.register_forward_pre_hook(keep, with_kwargs=True)
    model.model.layers[layer].register_forward_pre_hook(swapped, with_kwargs=True)
    assert kinds[2] != kinds[3] and "verified" in said
    with pytest.raises(UserError, match=f"layer {layer} .{kinds[layer]}. of Gemma3ForCausalLM"):
        prove_attention(model, bidirectional)
    assert model.config.sliding_window == model.model.layers[0].self_attn.sliding_window == 512


def test_a_layer_of_one_kind_that_stays_causal_is_found_out():
    model = set_attention(random_model("gemma3_text", num_hidden_layers=4), bidirectional=True)
    causal = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    model.set_attn_implementation("eager")

    def masked(module, arguments, keys):
        size = arguments[0].shape[1]
        return arguments, keys | {"attention_mask": causal[..., :size, :size]}

    model.model.layers[3].register_forward_pre_hook(masked, with_kwargs=True)
    with pytest.raises(UserError, match="layer 3 .full_attention. of Gemma3ForCausalLM"):
        prove_attention(model, bidirectional=True)


def test_a_model_that_is_bidirectional_by_another_key_is_refused():
    model = random_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UserError, match="sees other tokens than its causal mask"):
        prove_attention(model, bidirectional=False)
    with pytest.raises(UserError, match="by use_bidirectional_attention.*expected a decoder"):
        make_bidirectional(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "layered_sdpa"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gemmas_masks_are_those_that_are_written_down(attention, bidirectional):
    """A causal window counts the token itself; a bidirectional one does not."""
    model = random_model("gemma3_text", num_hidden_layers=2, sliding_window=3)
    set_attention(model, bidirectional)
    if attention == "layered_sdpa":
        model.config.bidirectional_layers = [0, 1] if bidirectional else []
        set_attention(model, bidirectional=True)
    else:
        model.set_attn_implementation(attention)
    ids, rows = torch.arange(9)[None], torch.arange(9)
    away = rows - rows[:, None]
    windowed = away.abs() <= 3 if bidirectional else (away <= 0) & (away > -3)
    whole = torch.ones(9, 9, dtype=torch.bool) if bidirectional else away <= 0
    with torch.no_grad():
        actual = model(ids, use_cache=False).logits
        masks = {"full_attention": whole, "sliding_attention": windowed}
        model.set_attn_implementation("eager")
        added = {
            kind: torch.zeros(9, 9).masked_fill(~mask, float("-inf"))[None, None]
            for kind, mask in masks.items()
        }
        expected = model.model(ids, attention_mask=added, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, model.lm_head(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_proved_too(dtype):
    model = random_model("qwen2").to(dtype)
    assert "causal, verified" in prove_attention(model, bidirectional=False)
    assert leak(model) <= tolerance(model) < 0.02 < leak(make_bidirectional(model))


def test_tokens_that_were_never_trained_prove_nothing_and_are_not_asked():
    """Byte tokens at the start of a vocabulary may be all alike."""
    model = random_model("llama")
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[: len(embeddings) // 2] = embeddings[0]
    assert leak(make_bidirectional(model)) > 1e-3
