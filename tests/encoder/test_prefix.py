"""The kept sink as a virtual token: stock peft and transformers alone, against the mask."""

import pytest
import torch
from builders import random_model
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from ubmoe.bidirectional import set_attention, set_layers
from ubmoe.config import BiSection, ModelSection
from ubmoe.encoder.prefix import save_sink
from ubmoe.encoder.sentence_encoder import as_encoder, save_encoder
from ubmoe.models.loading import load_model

FIRST = 5
IDS = torch.tensor([[FIRST, 7, 8, 9, 10, 11, 12, 13], [FIRST, 20, 21, 22, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])


def kept(family="llama", layers="all", **keys):
    model = random_model(family, num_hidden_layers=3, **keys)
    return set_attention(set_layers(model, layers, keep_sink=True), bidirectional=True)


def stock(directory):
    """What a user without this package loads."""
    model = AutoModel.from_pretrained(directory, is_causal=False)
    return PeftModel.from_pretrained(model, f"{directory}/sink").eval()


@pytest.mark.parametrize(
    ("family", "keys"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("gemma3_text", {"sliding_window": 5})],
)
def test_stock_peft_gives_the_states_of_the_mask(tmp_path, family, keys):
    model = kept(family, **keys)
    with torch.no_grad():
        expected = model.model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    assert save_sink(model, [FIRST, FIRST], tmp_path / "sink") == FIRST
    model.config.is_causal = True
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        actual = stock(tmp_path)(input_ids=IDS[:, 1:], attention_mask=MASK[:, 1:])
    real = MASK[:, 1:].bool()
    torch.testing.assert_close(
        actual.last_hidden_state[real],
        expected.last_hidden_state[:, 1:][real],
        atol=1e-5,
        rtol=1e-5,
    )


def test_no_prefix_says_other_masks_or_other_first_tokens(tmp_path):
    for model, firsts in (
        (kept(), [FIRST, 6]),
        (kept(layers=[1]), [FIRST]),
        (random_model("llama"), [FIRST]),
    ):
        assert save_sink(model, firsts, tmp_path / "sink") is None
        assert not (tmp_path / "sink").exists()


@pytest.mark.parametrize(("prompt", "fixed"), [("Sentence: {text} =", True), (None, False)])
def test_an_encoder_whose_texts_begin_alike_has_its_sink_beside_it(
    tiny_path, tmp_path, prompt, fixed
):

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    settings = BiSection(prompt=prompt, pooling="last", keep_sink=True)
    model = load_model(ModelSection(name=str(tiny_path)), *settings.mask)
    encoder = as_encoder(model, tokenizer, settings)
    save_encoder(encoder, model, tokenizer, settings, tmp_path / "bi")
    assert (tmp_path / "bi" / "sink").is_dir() is fixed
    assert ("stock peft" in (tmp_path / "bi" / "README.md").read_text()) is fixed
    if fixed:
        text = "The dog sleeps."
        ids = torch.tensor([tokenizer(prompt.format(text=text))["input_ids"]])
        with torch.no_grad():
            states = stock(tmp_path / "bi")(ids[:, 1:]).last_hidden_state
        vector = encoder.encode(text, convert_to_tensor=True)
        torch.testing.assert_close(states[0, -1], vector, atol=1e-5, rtol=1e-4)
