"""The card of an encoder: its code, run as it stands, gives the encoder's vectors; servers see its
pooling; and transformers 4 refuses what it would read causally.
"""

import json
import re
import stat

import pytest
import torch
import yaml
from builders import random_model
from huggingface_hub import ModelCard
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from ubmoe.config import EOL, PROMPT, BiSection, WhitenSection, load_config
from ubmoe.encoder import card, whitening
from ubmoe.encoder.sentence_encoder import as_encoder, load_saved, own_prompt, save_encoder
from ubmoe.models import cards
from ubmoe.models.tensors import GUARDED

TEXTS = ["The dog sleeps.", "A cat sat in the garden."]
LONG = "The cat and the dog and the horse " * 9
FORMS = [
    {},
    {"form": "eol"},
    {"form": "plain"},
    {"form": "plain", "attention": "causal", "pooling": "weighted_mean"},
    {"prompt": "Sentence: {text}"},
    {"prompt": "Say\n{text}", "prompt_in_mean": False},
    {"form": "eol", "whiten": WhitenSection(rows=200)},
]


def saved(tiny_path, folder, family="qwen2", **keys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    torch.manual_seed(3)
    model = random_model(family, vocab_size=len(tokenizer))
    settings = BiSection(**{"max_tokens": 40} | keys)
    model.config.is_causal = not settings.bidirectional
    encoder = as_encoder(model, tokenizer, settings)
    if settings.whiten:
        config = load_config(None, [])
        config = config.model_copy(update={"bi": settings})
        whitening.whiten(encoder, config, whitening.read_sentences(settings.whiten, tokenizer))
    save_encoder(encoder, model, tokenizer, settings, folder / "bi")
    return encoder


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


@pytest.mark.parametrize("keys", FORMS, ids=str)
def test_the_code_of_the_card_gives_the_vectors(tiny_path, tmp_path, monkeypatch, keys):
    encoder = saved(tiny_path, tmp_path, **keys)
    monkeypatch.chdir(tmp_path / "bi")
    expected = encoder.encode(TEXTS, convert_to_tensor=True)
    stock, plain = blocks(tmp_path / "bi")
    assert not any(empty in plain for empty in ('("" +', '+ "")', "+ []"))
    for code in (stock, plain):
        names = {}
        exec(code, names)
        actual = torch.as_tensor(names["vectors"])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    cut = encoder.encode(LONG, convert_to_tensor=True)  # too long: its end is lost, the prompt not
    assert len(encoder.tokenizer(LONG)["input_ids"]) > 40
    torch.testing.assert_close(names["vector"](LONG), cut, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_only_stands_before_a_text_is_where_all_look_for_it(tiny_path, tmp_path):
    encoder = saved(tiny_path, tmp_path, prompt="Sentence: {text}")
    said = json.loads((tmp_path / "bi" / "config_sentence_transformers.json").read_text())
    assert said["prompts"]["text"] == "Sentence: " and said["default_prompt_name"] == "text"
    form = json.loads((tmp_path / "bi" / "sentence_bert_config.json").read_text())
    assert "chat_template" not in json.dumps(form)
    assert own_prompt(encoder) == "Sentence: "
    text = (tmp_path / "bi" / "README.md").read_text()
    assert "--default-prompt-name text" in text and '"Sentence: The dog sleeps."' in text
    saved(tiny_path, tmp_path, form="eol")
    text = (tmp_path / "bi" / "README.md").read_text()
    wrapped = json.dumps({"input": EOL.replace("{text}", "The dog sleeps.")})
    assert wrapped in text and "--default-prompt-name" not in text


@pytest.mark.parametrize(
    ("pooling", "flag"),
    [
        ("mean", "pooling_mode_mean_tokens"),
        ("last", "pooling_mode_lasttoken"),
        ("weighted_mean", "pooling_mode_weightedmean_tokens"),
    ],
)
def test_servers_find_the_pooling_under_the_names_that_they_know(
    tiny_path, tmp_path, pooling, flag
):
    encoder = saved(tiny_path, tmp_path, pooling=pooling, prompt=PROMPT)
    modules = json.loads((tmp_path / "bi" / "modules.json").read_text())
    kinds = [module["type"] for module in modules]
    assert kinds == [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling")]
    actual = json.loads((tmp_path / "bi" / "1_Pooling" / "config.json").read_text())
    assert [name for name, on in actual.items() if name.startswith("pooling_mode") and on] == [flag]
    assert actual["word_embedding_dimension"] == encoder.get_embedding_dimension()
    again = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    assert again[1].pooling_mode == encoder[1].pooling_mode
    text = (tmp_path / "bi" / "README.md").read_text()
    assert ("cannot pool so" in text) == (pooling == "weighted_mean")


def test_no_server_is_named_that_would_read_the_encoder_causally(tiny_path, tmp_path):
    for family, named in (("qwen2", True), ("llama", False)):
        saved(tiny_path, tmp_path / family, family)
        text = (tmp_path / family / "bi" / "README.md").read_text()
        assert ("text-embeddings-router" in text) == named
        assert "--attention non-causal" in text


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_transformers_4_refuses_a_bidirectional_encoder(tiny_path, tmp_path, attention):
    encoder = saved(tiny_path, tmp_path, attention=attention)
    path = tmp_path / "bi" / "model.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata()["format"]
    # its from_pretrained raises for any other word than pt, tf, flax and mlx
    assert said == (GUARDED if attention == "bidirectional" else "pt")
    assert "5.2" in GUARDED
    model = AutoModel.from_pretrained(tmp_path / "bi")
    own = encoder[0].model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert load_saved(str(tmp_path / "bi"), "cpu").encode(TEXTS) == pytest.approx(
        encoder.encode(TEXTS), abs=1e-6
    )


def test_files_are_readable_by_others(tiny_path, tmp_path):
    saved(tiny_path, tmp_path)
    for path in (tmp_path / "bi").rglob("*"):
        if path.is_file() and not path.name.startswith(".ubmoe"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


def test_the_front_matter_is_what_a_hub_reads(tiny_path, tmp_path):
    encoder = saved(tiny_path, tmp_path)
    keys = ["model.name=org/base", "hub.license=apache-2.0", "output_dir=x"]
    keys += ["bi.stages=[{dataset: 'org/data:config', max_steps: 7}, {dataset: some.txt}]"]
    config = load_config(None, keys)
    scores = {
        "tasks": {"STSBenchmark": 53.6123},
        "sources": {"STSBenchmark": {"path": "mteb/stsbenchmark-sts", "revision": "b0"}},
    }
    card.complete(tmp_path / "bi", config, scores)
    read = ModelCard.load(tmp_path / "bi" / "README.md")
    data = read.data
    assert data.base_model == "org/base" and data.license == "apache-2.0"
    assert data.language == ["en"] and data.datasets == ["org/data"]
    assert data.pipeline_tag == "sentence-similarity"
    assert data.library_name == "sentence-transformers"
    [result] = data.eval_results
    assert (result.dataset_type, result.metric_value) == ("mteb/stsbenchmark-sts", 53.61)
    assert result.metric_type == "cosine_spearman"
    assert "- simcse: ffn, 7 steps of 64 rows (org/data:config)" in read.text
    assert f"torch {torch.__version__.split('+')[0]}" in read.text
    assert encoder is not None


def test_a_local_base_and_local_data_are_named_nowhere(tmp_path):
    cards.write(tmp_path, {"license": "mit"}, "# Some\n")
    config = load_config(None, [f"model.name={tmp_path}", f"bi.stages.0.dataset={tmp_path}/a.txt"])
    cards.complete(tmp_path, config, [f"{tmp_path}/a.txt", "tiny"], [])
    front, text = cards.read(tmp_path)
    assert "base_model" not in front and "datasets" not in front and front["license"] == "mit"
    assert str(tmp_path) not in yaml.safe_dump(front) + text
