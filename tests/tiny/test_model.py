"""The embedded model: the same bytes every time, a true language model, and a cache that heals."""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ubmoe.config import UserError
from ubmoe.tiny import language
from ubmoe.tiny import model as tiny

STEPS = 3  # the laws of building and caching do not depend on how well it is trained
HELD_OUT_SEED = 4321


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one finished checkpoint of a few steps."""
    cache = tmp_path_factory.mktemp("cache")
    tiny.tiny_directory(cache, STEPS)
    return cache


def start(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


def checksums(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def test_building_leaves_the_callers_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    before, python_before = torch.get_rng_state(), random.getstate()
    try:
        with torch.no_grad():
            tiny.build(tmp_path, 1)
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before


def test_it_reloads_as_a_small_float32_qwen2_that_stops_at_the_end_of_a_message(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.model_type == "qwen2"
    assert model.dtype == torch.float32
    assert 0.7e6 < model.num_parameters() < 1.3e6
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size == tiny.VOCABULARY
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 2048
    for settings_ in (model.config, model.generation_config):
        assert settings_.eos_token_id == tokenizer.eos_token_id == end
        assert settings_.pad_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.padding_side == "right"


def test_the_chat_template_is_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    question = "<|im_start|>user\nHello.<|im_end|>\n"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == question + "<|im_start|>assistant\nYes.<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == question + "<|im_start|>assistant\n"


def test_the_reloaded_tokenizer_is_the_trained_one(tokenizer: PreTrainedTokenizerBase) -> None:
    trained = tiny.train_tokenizer()
    texts = [message["content"] for chat in language.chats(50, 1) for message in chat["messages"]]
    texts.append("1234 doesn't  fit\n\ne\u0301\u00e9\u4e2d\U0001f600<|im_end|>\n")
    assert trained(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_every_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    @settings(deadline=None, max_examples=300)
    @given(st.text())
    @example(" .  , n't \r\n\0 <|im_end|> e\u0301")
    def check(text: str) -> None:
        text = unicodedata.normalize("NFC", text)  # Qwen2's tokenizer normalises, so does this
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    check()


def token_ids(tokenizer: PreTrainedTokenizerBase, chats: list[language.Chat]) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in chats]
    return tokenizer(texts)["input_ids"]


def test_held_out_perplexity_is_ten_times_below_a_unigrams(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    training = token_ids(tokenizer, language.chats(1000, tiny.SEED))
    held_out = token_ids(tokenizer, language.chats(60, HELD_OUT_SEED))
    counts = Counter(token for chat in training for token in chat)
    total = sum(counts.values()) + len(tokenizer)  # add-one smoothing
    predicted = [token for chat in held_out for token in chat[1:]]
    unigram = -sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted)
    nats = 0.0
    for chat in held_out:
        ids = torch.tensor([chat])
        with torch.no_grad():
            nats += model(input_ids=ids, labels=ids).loss.item() * (len(chat) - 1)
    ratio = math.exp(unigram - nats / len(predicted))
    assert ratio > 10, ratio


def test_it_knows_its_world(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    right = 0
    for fact in language.facts():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": fact.question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        whole = model.generate(**prompt, max_new_tokens=30, do_sample=False)
        answer = whole[0, prompt["input_ids"].shape[1] :]
        assert answer[-1] == tokenizer.eos_token_id, fact
        right += tokenizer.decode(answer, skip_special_tokens=True) == fact.answer
    assert right >= 0.9 * len(language.facts()), right


def damage(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    match how:
        case "weights cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "one bit turned":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        case "no manifest":
            (directory / tiny.MANIFEST).unlink()
        case "file missing":
            (directory / "tokenizer.json").unlink()


@pytest.fixture
def copied(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with that checkpoint, in which building is copying it."""
    whole = tiny.tiny_directory(good, STEPS)
    shutil.copytree(whole, tmp_path / "cache" / whole.relative_to(good))

    def build(directory: Path, steps: int) -> None:
        assert steps == STEPS
        shutil.copytree(whole, directory, ignore=shutil.ignore_patterns(tiny.MANIFEST))

    monkeypatch.setattr(tiny, "build", build)
    return tmp_path / "cache"


@pytest.mark.parametrize("how", ["weights cut", "one bit turned", "no manifest", "file missing"])
def test_a_damaged_cache_is_rebuilt(copied: Path, how: str) -> None:
    directory = tiny.tiny_directory(copied, STEPS)
    before = checksums(directory)
    damage(directory, how)
    assert not tiny.is_complete(directory)
    assert tiny.tiny_directory(copied, STEPS) == directory
    assert checksums(directory) == before


def test_a_good_cache_is_used_without_building_or_writing(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    directory = tiny.tiny_directory(good, STEPS)
    monkeypatch.setattr(tiny, "build", refuse)
    monkeypatch.setattr(tiny, "FileLock", refuse)
    assert tiny.tiny_directory(good, STEPS) == directory


def test_what_a_killed_build_left_is_removed(copied: Path) -> None:
    directory = tiny.tiny_directory(copied, STEPS)
    shutil.rmtree(directory)
    partial = directory.with_suffix(".partial")
    partial.mkdir()
    (partial / "rubbish").write_text("half")
    assert tiny.tiny_directory(copied, STEPS) == directory
    assert tiny.is_complete(directory)
    assert not partial.exists()
    assert not (directory / "rubbish").exists()


@pytest.mark.slow
def test_two_processes_at_once_build_once_and_the_same_bytes_whatever_the_caller_has_seeded(
    good: Path, tmp_path: Path
) -> None:
    """The same as this process has built, in a process of other seeds, hashes and defaults."""
    code = (
        "import random, torch; from ubmoe.tiny import model as tiny; build = tiny.build\n"
        "torch.manual_seed({seed}); random.seed({seed}); torch.rand({seed})\n"
        "torch.set_default_dtype(torch.bfloat16); torch.set_grad_enabled(False)\n"
        "tiny.build = lambda *rest: (print('built'), build(*rest))\n"
        f"print(tiny.tiny_directory(r'{tmp_path}', {STEPS}))"
    )
    both = [start(code.format(seed=item), PYTHONHASHSEED=str(item)) for item in (1, 2)]
    said = [output(process) for process in both]
    directory = tiny.tiny_directory(tmp_path, STEPS)
    assert sum("built" in text for text in said) == 1, said
    assert all(text.endswith(str(directory)) for text in said)
    assert tiny.is_complete(directory)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == [directory]
    actual = checksums(directory)
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(actual)
    assert actual == checksums(tiny.tiny_directory(good, STEPS))


@pytest.mark.parametrize("change", ["steps", "source", "version"])
def test_a_changed_recipe_meets_no_old_cache(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(STEPS)
    if change == "source":
        source = tmp_path / "language.py"
        source.write_bytes(Path(language.__file__).read_bytes() + b"\n")
        monkeypatch.setattr(language, "__file__", str(source))
    if change == "version":
        monkeypatch.setattr(tiny.tokenizers, "__version__", "0.0")
    assert tiny.recipe(STEPS + (change == "steps")) != recipe


def test_the_cache_folder_is_argument_then_environment_then_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("UBMOE_CACHE", "/environment")
    assert tiny.cache_folder("/argument") == Path("/argument")
    assert tiny.cache_folder(None) == Path("/environment")
    monkeypatch.delenv("UBMOE_CACHE")
    if sys.platform == "linux":
        assert tiny.cache_folder(None) == Path("/xdg/ubmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tiny.cache_folder(None).is_relative_to(Path.home())


def test_an_unwritable_cache_folder_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        tiny.tiny_directory(tmp_path / "file" / "cache", STEPS)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(tmp_path / "file" / "cache"), "model.cache", "UBMOE_CACHE"):
        assert part in message


def test_the_manifest_names_every_file(good: Path) -> None:
    directory = tiny.tiny_directory(good, STEPS)
    manifest = json.loads((directory / tiny.MANIFEST).read_text())
    assert manifest.keys() | {tiny.MANIFEST} == {file.name for file in directory.iterdir()}
