"""The encoder reads what it should, and its directory loads in stock libraries, both ways."""

import json

import numpy as np
import pytest
import torch
from builders import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ubmoe.bidirectional import prove_attention
from ubmoe.config import PROMPT, BiSection, ModelSection, UserError
from ubmoe.encoder.sentence_encoder import as_encoder, rendered, save_encoder
from ubmoe.models.loading import load_tokenizer

TEXTS = ["The cat slept.", "A much longer sentence about {braces} and 'quotes' in the garden."]


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def build(tokenizer, tied=True, **keys):
    model = random_model("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=tied)
    bi = BiSection(**keys)
    model.config.is_causal = bi.attention == "causal"
    return as_encoder(model, tokenizer, bi), model, bi


@pytest.mark.parametrize("prompt", [None, PROMPT, "{text}", 'Say "{text}" \\n {{x}} again'])
def test_a_text_stands_in_the_prompt_and_in_no_chat_template(tokenizer, prompt):
    encoder, _, _ = build(tokenizer, prompt=prompt)
    for text in TEXTS:
        expected = text if prompt is None else prompt.replace("{text}", text)
        assert rendered(encoder, text) == expected


def test_vectors_are_the_mean_or_the_last_of_the_last_states(tokenizer):
    for pooling in ("mean", "last"):
        encoder, model, _ = build(tokenizer, pooling=pooling, prompt="Say {text} now")
        ids = tokenizer("Say The cat slept. now", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0]
        expected = states.mean(0) if pooling == "mean" else states[-1]
        found = encoder.encode([TEXTS[0]], convert_to_tensor=True)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_stays_out_of_the_mean_in_every_way_to_the_vector(tokenizer, tmp_path):
    prompt = "Say this:\n{text}"
    encoder, model, bi = build(tokenizer, prompt=prompt, prompt_in_mean=False)
    alone = len(tokenizer("Say this:\n")["input_ids"])
    expected = []
    for text in TEXTS:
        ids = tokenizer(prompt.replace("{text}", text), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model.model(ids).last_hidden_state[0, alone:].mean(0))
    expected = torch.stack(expected)
    assert rendered(encoder, TEXTS[0]) == prompt.replace("{text}", TEXTS[0])
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), found, atol=0, rtol=0)


def test_a_prompt_that_texts_melt_into_cannot_stay_out_of_the_mean(tokenizer):
    with pytest.raises(UserError, match="changes the tokens of the prompt; expected a prompt that"):
        build(tokenizer, prompt="The ca{text}", prompt_in_mean=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_directory_loads_in_stock_libraries_both_ways(tokenizer, tmp_path, tied, attention):
    encoder, model, bi = build(tokenizer, tied, attention=attention, max_tokens=77)
    vectors = encoder.encode(TEXTS)
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), vectors)
    assert again.max_seq_length == 77
    assert rendered(again, "x") == PROMPT.replace("{text}", "x")
    prove_attention(again[0].model, bidirectional=attention == "bidirectional")
    prove_attention(AutoModel.from_pretrained(tmp_path / "bi"), attention == "bidirectional")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "bi", is_causal=True).eval()
    prove_attention(lm, bidirectional=False)
    torch.testing.assert_close(lm.lm_head.weight, model.lm_head.weight, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "bi").model_max_length == 2048
    assert "is_causal=True" in (tmp_path / "bi" / "README.md").read_text()
    modules = json.loads((tmp_path / "bi" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_saving_again_replaces_the_whole_directory(tokenizer, tmp_path):
    encoder, model, bi = build(tokenizer)
    (tmp_path / "bi").mkdir()
    (tmp_path / "bi" / "stale.safetensors").write_text("x")
    save_encoder(encoder, model, tokenizer, bi, tmp_path / "bi")
    assert not (tmp_path / "bi" / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bi"]


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_a_vector_does_not_depend_on_its_company_or_on_the_padding_side(tokenizer, text):
    encoder, _, _ = build(tokenizer)
    [alone] = encoder.encode([text])
    together = encoder.encode([text, *TEXTS])[0]
    encoder.tokenizer.padding_side = "left"
    left = encoder.encode([text, *TEXTS])[0]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(left, alone, atol=1e-5)


def test_a_model_without_a_padding_token_is_padded_all_the_same(tokenizer, tmp_path):
    expected, model, bi = build(tokenizer)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSection(name=str(tmp_path)))
    encoder = as_encoder(model, loaded, bi)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)
    save_encoder(encoder, model, loaded, bi, tmp_path / "bi")
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)
