"""Download what a config names, for machines without a network: model, data sets, tasks.

Everything lands in the libraries' own caches; afterwards the scripts run with HF_HUB_OFFLINE=1.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ubmoe import cli, owned
from ubmoe.bounds import expanded
from ubmoe.config import Config, UserError, error_reason
from ubmoe.data.inputs import READ, values
from ubmoe.data.rows import chosen_rows, is_file
from ubmoe.files import write_json

log = logging.getLogger(__name__)
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no code, no pickles
LOCAL = ("dependence.chat_template", "probing.data")  # keys that name no data of a hub
KINDS = {  # of keys that name no data sets
    **dict.fromkeys(("evaluation.sts", "trajectory.sts", "scan.pairs"), "sts"),
    **dict.fromkeys(("evaluation.generation", "bitune.generation"), "generation"),
    "evaluation.mteb": "mteb",
}


def run(config: Config) -> str:
    """Fetch everything; returns the path of prefetch.json, which lists it. Raises UserError."""
    path = Path(config.output_dir) / "prefetch.json"
    owned.check(path)
    wanted = list(needs(config))
    fetched = []
    with tqdm(wanted, desc="prefetch", disable=None) as bar:
        for kind, name in bar:
            bar.set_postfix_str(f"{kind} {name}")
            fetched.append({"kind": kind, "name": name.partition("@")[0]} | FETCH[kind](name))
            log.info("%s %s: here", kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fetched": fetched})
    return str(path)


def needs(config: Config) -> Iterator[tuple[str, str]]:
    """(kind, name) of all that is not on this machine by nature: no local file, and no tiny.

    A model's name is followed by @ and its revision, where one is asked for.
    """
    models = [(config.model.name, config.model.revision)]
    models += [(model.name, model.revision) for model in config.probing.models]
    for name, revision in dict.fromkeys(models):
        if name != "tiny" and not expanded(name).exists():
            yield "model", f"{name}@{revision}" if revision else name
    keys = dict.fromkeys(key for read in READ.values() for key in read if key not in LOCAL)
    every = ((key, value) for key in keys for _, value in values(config, key))
    for kind, name in dict.fromkeys(
        (KINDS.get(key, "dataset"), name)
        for key, value in every
        for name in (value if isinstance(value, list) else [value])
    ):
        if not (name == "tiny" or is_file(name) or name.endswith((".yaml", ".yml"))):
            yield kind, name


def _model(name: str) -> dict[str, Any]:
    from huggingface_hub import snapshot_download

    name, _, revision = name.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=list(FILES))
    except Exception as error:  # the hub's library raises nearly every type here
        raise _missing("model.name", name, error) from error
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"model.name: {name} has no .safetensors weights, and pickles are not fetched; "
            "expected a model that has them"
        )
    return {"revision": Path(folder).name, "bytes": sum(sizes)}


def _sts(name: str) -> dict[str, Any]:
    from ubmoe.evaluate.sts import sts_tasks

    return _loaded("evaluation.sts", sts_tasks([name]))


def _mteb(name: str) -> dict[str, Any]:
    from ubmoe.evaluate.benchmark import mteb_tasks

    return _loaded("evaluation.mteb", mteb_tasks([name]))


def _loaded(key: str, tasks: Sequence[Any]) -> dict[str, Any]:
    """The data set of a task, or of several by their names."""
    sources = {}
    for task in tasks:
        name = task.metadata.name
        try:
            task.load_data()
        except Exception as error:  # as above
            raise _missing(key, name, error) from error
        task.unload_data()
        sources[name] = dict(task.metadata.dataset)
    return sources if len(sources) > 1 else dict(*sources.values())


def _generation(name: str) -> dict[str, Any]:
    from lm_eval.tasks import get_task_dict

    from ubmoe.evaluate.generation import check_tasks, manager

    check_tasks([name])
    try:
        loaded = get_task_dict([name], manager())
    except Exception as error:  # as above
        raise _missing("evaluation.generation", name, error) from error
    return {"tasks": len(loaded)}


def _missing(key: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"{key}: {name} cannot be loaded ({error_reason(error)}); check the name and the network"
    )


FETCH = {
    "model": _model,
    "dataset": lambda name: {"rows": len(chosen_rows(name))},
    "sts": _sts,
    "mteb": _mteb,
    "generation": _generation,
}


if __name__ == "__main__":
    cli.run("python -m ubmoe.prefetch", __doc__ or "", run)
