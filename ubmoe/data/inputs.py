"""Digests of all that a run reads: they identify a result on any machine.

A file is identified by its bytes, a folder of a model by those of its files, whatever they are
called by the configuration. A hub's data sets and tasks are identified by their names.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ubmoe.bounds import DATA, expanded, read_text, regular
from ubmoe.config import Config, ModelSection, UserError
from ubmoe.files import digest_of_file
from ubmoe.tiny import language

# Keys that say what is read, by the result: their digests stand for them.
READ: dict[str, tuple[str, ...]] = {
    "dependence": ("dependence.dataset", "dependence.chat_template"),
    "sts": (
        *("bi.stages.N.dataset", "bi.stages.N.lm_dataset", "bi.whiten.dataset"),
        *("evaluation.sts", "trajectory.sts", "trajectory.perplexity"),
    ),
    "generation": ("ubmoe.dataset", "ubmoe.sentences", "evaluation.sts", "evaluation.generation"),
    "evaluation": (
        *("ubmoe.dataset", "evaluation.sts", "evaluation.mteb", "evaluation.generation"),
        "evaluation.perplexity",
    ),
    "scan": ("scan.pairs",),
    "swap": ("ubmoe.dataset",),
    "shift": ("ubmoe.dataset",),
    "probing": ("probing.data",),
    "bitune": ("bitune.dataset", "bitune.generation"),
}
MODEL = ("model.name", "model.adapter")
OF_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")  # one at least
FOLDERS = ("probing.data",)  # keys that name a folder of data
MOST = 10_000  # files of one; more are nobody's data, but somebody's disk
# Of a model's folder: no cards, no pictures, no states of trainers.
SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")


def inputs(config: Config, result: str) -> dict[str, str | None]:
    """{key: sha256} of the model and the data of a result; None for what is not on this machine.

    The encoder of a mixture is not among them: its result has a digest of the weights itself.
    """
    digests: dict[str, str | None] = {"model.name": digest_of_model(config.model)}
    if adapters := config.model.adapters:
        adapter_digests = [_of_path(expanded(adapter)) for adapter in adapters]
        digests["model.adapter"] = (
            None if None in adapter_digests else " ".join(map(str, adapter_digests))
        )
    for key in READ.get(result, ()):
        for name, value in values(config, key):
            digests[name] = _of_value(value, config.evaluation.data, key in FOLDERS)
    return digests


def values(config: Config, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a key that is set and means something."""
    first, _, last = key.partition(".stages.N.")
    if last:
        for number, stage in enumerate(config.bi.stages):
            if last != "lm_dataset" or stage.lm_weight:
                yield f"{first}.stages.{number}.{last}", getattr(stage, last)
        return
    if key == "bi.whiten.dataset":
        if config.bi.whiten is not None:
            yield key, config.bi.whiten.dataset
        return
    section, _, last = key.partition(".")
    unused = {
        "ubmoe.sentences": config.ubmoe.objective != "both" or not config.ubmoe.mixes,
        "dependence.chat_template": config.dependence.chat_template is None,
        "evaluation.mteb": not config.evaluation.mteb,
        "evaluation.perplexity": not config.evaluation.perplexity,
        "trajectory.sts": not config.trajectory.steps,
        "trajectory.perplexity": not (config.trajectory.steps and config.trajectory.perplexity),
    }
    if not unused.get(key):
        yield key, getattr(getattr(config, section), last)


def digest_of_model(config: ModelSection) -> str | None:
    """sha256 of the model's files; None for what is not on this machine."""
    if config.name == "tiny":
        return _of_files([Path(language.__file__), Path(language.__file__).with_name("model.py")])
    path = expanded(config.name)
    if path.exists():
        return _of_path(path)
    try:
        cached = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    except ValueError:  # no id of a hub
        return None
    return _of_path(Path(cached).parent) if isinstance(cached, str) else None


def _of_path(path: Path) -> str | None:
    if path.is_file():
        return _of_files([path])
    if not any(_is(Path.is_file, file) for form in OF_MODEL for file in path.glob(form)):
        return None  # no model, and perhaps all of a disk
    files = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    return _of_files(sorted(files), path) if files else None


def _of_value(value: Any, data: str, folders: bool = False) -> str | None:
    """The digest of a file, a name or a text; for several, that of their digests and file names.

    folders: whether it may be a folder. None of what no reader would take.
    """
    if isinstance(value, list):
        several = [(Path(name).stem, _of_value(name, data)) for name in value]
        return None if None in dict(several).values() else _of_text(repr(several))
    if value == "tiny":
        return _of_files([Path(language.__file__)])
    path = expanded(value)
    if folders and _is(Path.is_dir, path):
        return _of_files(sorted(_below(path)), path)
    if not _is(Path.is_file, path):
        local = path.is_absolute() or value.startswith((".", "~"))
        return None if local else _of_text(value)
    try:
        text = read_text(path) if path.suffix in (".yaml", ".yml") else ""
        regular(path, DATA)
    except (OSError, ValueError):  # the reader says what is wrong with it
        return None
    if text:  # a task, with those of the local files that it names
        named = sorted(
            file
            for near in (Path(data).iterdir() if data and Path(data).is_dir() else ())
            if near.name in text or near.stem in text
            for file in ([near] if near.is_file() else _below(near))
        )
        return _of_files([path, *named])
    return _of_files([path])


def _below(folder: Path) -> Iterator[Path]:
    """The files in it, whatever is linked; what is hidden is nobody's data."""
    count = 0
    for where, folders, names in os.walk(folder, followlinks=True):
        here = Path(where).resolve()
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for link in [folder for folder in folders if Path(where, folder).is_symlink()]:
            if here.is_relative_to(Path(where, link).resolve()):  # a link that leads back
                folders.remove(link)
        files = [Path(where, name) for name in names if not name.startswith(".")]
        yield from (file for file in files if file.is_file())
        if (count := count + len(files)) > MOST:
            raise UserError(f"{folder}: holds more than {MOST:,} files; expected data alone")


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except OSError:  # a template is too long for a name
        return False


def _of_files(paths: list[Path], below: Path | None = None) -> str:
    """One file's own digest; for several, one with their names, below a folder or alone."""
    several = [
        (str(path.relative_to(below)) if below else path.name, _of_file(path)) for path in paths
    ]
    return several[0][1] if len(paths) == 1 and below is None else _of_text(repr(several))


def _of_file(path: Path) -> str:
    status = path.stat()
    return _read(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _read(path: Path, *_: int) -> str:
    """sha256 of a file's bytes, once in a process as long as the file stays as it is."""
    return digest_of_file(path)


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
