"""Bad input to every program: exit 2, one line that names the culprit, and nothing written.

The cases are the product of programs, of what they read, and of the ways in which that goes wrong.
"""

import json
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from builders import random_model, run
from pydantic.fields import FieldInfo
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import BiSection
from ubmoe.config.schema import Config, keys
from ubmoe.encoder.sentence_encoder import as_encoder, save_encoder

PROGRAMS = {
    "calculate_dp.py": "dependence.dataset",
    "train_bi.py": "bi.stages.0.dataset",
    "train_ubmoe.py": "ubmoe.dataset",
    "-m ubmoe.evaluate": "evaluation.sts",
    "-m ubmoe.bitune": "bitune.dataset",
    "-m ubmoe.probing": "probing.data",
}


def check(folder: Path, script: str, culprit: str, *arguments: object) -> None:
    """The program ends with exit 2 and one line naming the culprit, and has written nothing."""
    before = sorted(folder.rglob("*"))
    keys = ["model.device=cpu", f"output_dir={folder}/made/run", *map(str, arguments)]
    code, output, errors = run(*keys, script=script)
    said = [line for line in errors.splitlines() if line.startswith("error")]
    assert (code, output) == (2, ""), errors[-2000:]
    assert "Traceback" not in errors and len(said) == 1, errors[-2000:]
    assert errors.splitlines()[-1] == said[0] and said[0].startswith("error: ")
    assert culprit in said[0], said[0]
    assert not any(word in said[0] for word in ("NoneType", "object has no attribute", "KeyError"))
    assert sorted(folder.rglob("*")) == before


# --- keys -----------------------------------------------------------------------------------------


def wrong(kind: Any) -> Iterator[Any]:
    """Values that a key of this type must not take."""
    kind, metadata = unwrapped(kind)
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if not any(get_origin(part) is dict for part in parts) and "dict" not in str(kind):
        yield {"a": 1}
    bounds = {name: getattr(item, name) for item in metadata for name in dir(item)}
    if "ge" in bounds:
        yield bounds["ge"] - 1
    if "gt" in bounds:
        yield bounds["gt"]
    if "le" in bounds:
        yield bounds["le"] + 1
    if bool not in parts and not any(get_origin(part) is Literal for part in parts):
        if str not in parts:
            yield "word"
            yield True
        else:
            yield [[]]
    if any(get_origin(part) is Literal for part in parts):
        yield "no such word"
    if float in parts:
        yield float("nan")


def unwrapped(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type below its annotations, and these."""
    metadata: tuple[Any, ...] = ()
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata += tuple(more)
    return kind, metadata


def bad_keys() -> Iterator[tuple[str, str, Any]]:
    """(program, key, value): every key of the schema, the programs in turn."""
    places: list[tuple[str, FieldInfo]] = [
        (name, field) for name, field in keys(Config) if ".N." not in name or "stages" in name
    ]
    number = 0
    for name, field in places:
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        for value in wrong(kind):
            yield list(PROGRAMS)[number % len(PROGRAMS)], name.replace(".N", ".0"), value
            number += 1


def spelled(value: Any) -> str:
    return ".nan" if isinstance(value, float) and np.isnan(value) else json.dumps(value)


@pytest.mark.parametrize(("script", "key", "value"), bad_keys())
def test_a_value_that_a_key_cannot_take_is_refused(script, key, value, tmp_path):
    where = "bi.stages=[{}]", f"{key}={spelled(value)}"
    check(tmp_path, script, key.removesuffix(".0"), *where[key == "bi.stages" :])


# --- data -----------------------------------------------------------------------------------------

GOOD = {
    "chats": '{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", '
    '"content": "c d e"}]}',
    "texts": '{"text": "a b c"}',
}
FILES: dict[str, bytes | None] = {
    "missing.jsonl": None,
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n  \n",
    "binary.jsonl": bytes(range(256)) * 8,
    "utf16.jsonl": '{"text": "a"}'.encode("utf-16"),
    "half.jsonl": b'{"text": "a \\ud83d b", "messages": [{"role": "user", "content": "\\ud83d"}, '
    b'{"role": "assistant", "content": "\\ud83d"}]}\n',
    "broken.jsonl": b'{"text": "a\n',
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b'{"text": 5, "messages": 5}\n',
    "null.jsonl": b'{"text": null, "messages": null}\n',
    "nothing.jsonl": b'{"text": " ", "messages": []}\n',
    "other.jsonl": b'{"sentence_of_mine": "a b c"}\n',
    "roleless.jsonl": b'{"messages": [{"content": "a"}]}\n',
    "deep.jsonl": b"[" * 100_000,
    "object.json": b'{"text": "a"}',
    "ragged.csv": b"text,messages\na,b,c\n",
    "quote.csv": b'text\n"a\n',
    "headless.tsv": b"",
    "kind.parquet": b"PAR1",
}


def bad_files() -> Iterator[tuple[str, str]]:
    for script in PROGRAMS:
        for name in FILES:
            if script != "-m ubmoe.probing" and (name, script) != ("roleless.jsonl", "train_bi.py"):
                yield script, name


@pytest.fixture(scope="module")
def things(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Broken data, models and encoders, and one good encoder; read by all, written by none."""
    folder = tmp_path_factory.mktemp("things")
    for name, content in FILES.items():
        if content is not None:
            (folder / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.config.is_causal = False
    encoder = as_encoder(model, tokenizer, BiSection())
    save_encoder(encoder, model, tokenizer, BiSection(), folder / "bi")
    for name, damage in MODELS.items():
        if damage is not None:
            shutil.copytree(tiny_path, folder / name)
            damage(folder / name)
    (folder / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    (folder / "text.gguf").write_text("no model")
    return folder


@pytest.mark.parametrize(("script", "name"), bad_files())
def test_a_file_that_cannot_be_read_is_named(script, name, things, tmp_path):
    key, path = PROGRAMS[script], f"{things}/{name}"
    value = f"[{path}]" if key == "evaluation.sts" else path
    more = [f"ubmoe.bi={things}/bi"] if script == "train_ubmoe.py" else []
    check(tmp_path, script, name, f"{key}={value}", *more)


# --- models ---------------------------------------------------------------------------------------


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def changed(**values: Any) -> Callable[[Path], object]:
    """The config with other values; None: without."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def spoiled(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = np.nan
    save_file(tensors, path, {"format": "pt"})


def lacking(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tok*"):
        path.unlink()


def of_bert(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    random_model("bert", vocab_size=1000).save_pretrained(folder)


MODELS: dict[str, Callable[[Path], object] | None] = {
    "nowhere/at/all": None,
    "not_json": written("config.json", "{"),
    "a_list": written("config.json", "[]"),
    "typeless": changed(model_type=None, architectures=None),
    "unknown": changed(model_type="a kind of mine"),
    "shapes": changed(hidden_size=640),
    "fewer_layers": changed(num_hidden_layers=2),
    "more_layers": changed(num_hidden_layers=9),
    "weightless": lambda folder: (folder / "model.safetensors").unlink(),
    "cut": cut,
    "spoiled": spoiled,
    "lacking": lacking,
    "without_tokenizer": without_tokenizer,
    "tokenizer": written("tokenizer.json", "{"),
    "of_bert": of_bert,
}
GGUFS = ("missing.gguf", "garbage.gguf", "text.gguf")


def bad_models() -> Iterator[tuple[str, str]]:
    """Three programs for each, in turn."""
    scripts = list(PROGRAMS)
    for number, name in enumerate((*MODELS, *GGUFS)):
        for step in (0, 2, 3):
            script = scripts[(number + step) % len(scripts)]
            if (script, name) != ("-m ubmoe.evaluate", "of_bert"):  # which is an encoder indeed
                yield script, name


@pytest.mark.slow
@pytest.mark.parametrize(("script", "name"), bad_models())
def test_a_model_that_cannot_be_loaded_is_named(script, name, things, tmp_path):
    more = {
        "train_ubmoe.py": [f"ubmoe.bi={things}/bi"],
        "-m ubmoe.probing": ["probing.tasks=[context]"],
    }
    bert = "bert" if script == "train_ubmoe.py" else "Bert"
    culprit = bert if name == "of_bert" else name  # loaded well, and no decoder
    check(tmp_path, script, culprit, f"model.name={things}/{name}", *more.get(script, []))
