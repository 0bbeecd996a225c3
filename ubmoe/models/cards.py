"""Model cards: the front matter that a hub reads, how a model was made, and what it scored."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ubmoe.bounds import METADATA, expanded, read_text
from ubmoe.config import Config, StageSection

START = 'directory = "."'  # a card's code runs in the folder of the card
ON_HUB = "from huggingface_hub import snapshot_download\n\ndirectory = snapshot_download({name!r})"
CARD = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PACKAGES = ("ubmoe", "torch", "transformers", "sentence-transformers", "peft")
FRONT = re.compile(r"---\n(.*?)\n---\n+", re.S)


def is_hub_id(name: str) -> bool:
    """Whether a name is of a hub, org/name[:config[:split]], and no path that is here."""
    name = name.partition(":")[0]
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def write(folder: Path, metadata: Mapping[str, Any], text: str) -> None:
    """README.md of a model's folder: the front matter, but for what is empty, and the text."""
    front = {key: value for key, value in metadata.items() if value not in (None, [], "")}
    said = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    (folder / CARD).write_text(f"---\n{said}---\n{text}", encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the text of a card; ({}, "") where there is none."""
    path = folder / CARD
    text = read_text(path, METADATA) if path.is_file() else ""
    matched = FRONT.match(text)
    try:
        front = yaml.safe_load(matched[1]) if matched else {}
    except yaml.YAMLError:
        front = {}
    return (front if isinstance(front, dict) else {}), text[matched.end() if matched else 0 :]


def complete(
    folder: Path,
    config: Config,
    datasets: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    made: str = "",
) -> None:
    """Add to a folder's card what is known when the run ends.

    datasets: that it was trained on. results: of `result`. made: a last section, to which the
    versions are added.
    """
    front, text = read(folder)
    base = config.model.name
    more: dict[str, Any] = {
        "base_model": base if is_hub_id(base) else None,
        "license": config.hub.license or licence_of(base),
        "language": config.hub.language,
        "datasets": sorted(
            {dataset.partition(":")[0] for dataset in datasets if is_hub_id(dataset)}
        ),
    }
    if results:
        more["model-index"] = [
            {"name": folder.name, "results": [dict(result) for result in results]}
        ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    write(folder, front | more, f"{text}{made}\nMade with {versions}.\n")


def licence_of(name: str) -> str | None:
    """The licence that a local model's card names."""
    folder = expanded(name)
    licence = read(folder)[0].get("license") if folder.is_dir() else None
    return licence if isinstance(licence, str) else None


def result(
    task: str, dataset: str, source: str, metric: str, value: float, name: str
) -> dict[str, Any]:
    """A score as a hub reads it. source: of the data, as an id; name: of the metric, for people."""
    return {
        "task": {"type": task},
        "dataset": {"name": dataset, "type": source},
        "metrics": [{"type": metric, "value": round(value, 2), "name": name}],
    }


def sts_results(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of an `sts` section: Spearman x 100 of each task."""
    return [
        result(
            "sentence-similarity",
            name,
            str(scores["sources"].get(name, {}).get("path", name)),
            "cosine_spearman",
            score,
            "Spearman x 100 of cosines",
        )
        for name, score in scores["tasks"].items()
    ]


def generation_results(
    tasks: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str], perplexity: float | None
) -> list[dict[str, Any]]:
    """The results of generation tasks, by each one's main metric, and the perplexity of chats."""
    kind = "text-generation"
    results = [
        result(kind, name, name, metric, tasks[name][metric], f"{metric} by lm-eval")
        for name, metric in metrics.items()
        if metric in tasks.get(name, {})
    ]
    if perplexity is not None:
        said = "perplexity of held-out answers"
        results.append(result(kind, "held-out chats", "chats", "perplexity", perplexity, said))
    return results


def named(name: str) -> str:
    """A hub id as it is; of a local path its last part."""
    return Path(name).name if Path(name).exists() else name


def stage_line(stage: StageSection) -> str:
    """How a stage trained, in a line."""
    length = f"{stage.max_steps} steps"
    if stage.max_steps < 0:
        length = f"{stage.num_train_epochs:g} epochs"
    adapters = f" by adapters of rank {stage.lora.rank}" if stage.lora else ""
    return (
        f"- {stage.objective}: {', '.join(stage.train)}{adapters}, {length} of "
        f"{stage.per_device_train_batch_size} rows ({named(stage.dataset)}), learning rate "
        f"{stage.learning_rate:g}"
    )


def for_hub(text: str, name: str) -> str:
    """A card's text as it runs anywhere, of a model that a hub calls so."""
    text = text.replace(START, ON_HUB.format(name=name))
    return text.replace("vllm serve . ", f"vllm serve {name} ").replace(
        "--model-id . ", f"--model-id {name} "
    )


def with_base(text: str, name: str | None) -> str:
    """An adapter_config.json that names its base so; None: no path of this machine."""
    return json.dumps(json.loads(text) | {"base_model_name_or_path": name}, indent=2)
