"""STS scores by mteb: its own tasks, local files, and the embedded language's pairs.

mteb keys its cache by model name and gives every local model the same one, so the second of two
would get the first one's scores: no cache is used, and every run is named by itself.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader
from tqdm import tqdm

from ubmoe.bootstrap import correlations, interval
from ubmoe.bounds import DATA, read_bytes
from ubmoe.config import UserError, listed
from ubmoe.data.bad_rows import usable
from ubmoe.data.rows import GZIPPED, Row, cell, finite_number, is_file, read_rows
from ubmoe.encoder.sentence_encoder import lengths
from ubmoe.evaluate.benchmark import (
    ENGLISH,
    benchmark_named,
    evaluated,
    load_data,
    prompt_of,
    quiet,
    task_named,
)
from ubmoe.models.digests import digest, digest_of_rows, digest_of_tokenizer, resume_key
from ubmoe.models.precision import Setting, uses_bfloat16
from ubmoe.similarity import UNITS
from ubmoe.tiny import language, sizes
from ubmoe.unfinished import Unfinished

log = logging.getLogger(__name__)
TINY_SEED = 2  # of the embedded language
RESAMPLES = 2000  # of an interval: 10,000 pairs take three seconds
KEY = "evaluation.sts"
SUBSETS = {"STS17": ["en-en"], "STS22": ["en"]}  # the English ones, as in the paper's Table 2


def sts_scores(
    encoder: SentenceTransformer,
    tasks: list[AbsTaskSTS],
    batch_size: int,
    bf16: Setting = False,
    partial: Path | None = None,
    route: str = "",
) -> dict[str, Any]:
    """The `sts` section: Spearman correlation of cosines x 100 by task, their average, and sources.

    It names its metric and its unit. `intervals`: 95 % of each score, by the bootstrap over its
    pairs. partial: a file that keeps the scores of whole tasks, and whose scores of the same
    encoder are taken. route: of the encoder, where its weights do not say it. Raises UserError for
    a score that is not finite: it is never averaged.
    """
    unfinished = Unfinished(partial, _key(encoder, batch_size, bf16, route) if partial else {})
    kept = unfinished.load("scores")
    done: dict[str, Any] = json.loads(str(kept[0])) if kept else {}
    for task in tqdm(tasks, desc="STS", unit="task", disable=None, leave=False):
        name, source = task.metadata.name, task.metadata.dataset
        if done.get(name, {}).get("source", {}).items() >= source.items():
            log.info("%s: scored already", name)
            continue
        done[name] = _task_scores(encoder, task, batch_size, bf16)
        unfinished.save(scores=json.dumps(done))
    columns = {
        column: {task.metadata.name: done[task.metadata.name][column] for task in tasks}
        for column in ("score", "interval", "source", "truncated")
    }
    scores = columns["score"]
    return {
        **UNITS,
        **{"tasks": scores, "intervals": columns["interval"]},
        "average": sum(scores.values()) / len(scores) if scores else None,
        **{"sources": columns["source"], "truncated": columns["truncated"]},
        **{"max_tokens": encoder.max_seq_length, "mteb": mteb.__version__},
    }


def _task_scores(
    encoder: SentenceTransformer, task: AbsTaskSTS, batch_size: int, bf16: Setting
) -> dict[str, Any]:
    """Score, interval, source and truncated texts of a task. Raises UserError."""
    name, cut = task.metadata.name, truncated_texts(encoder, task)
    with TemporaryDirectory() as folder:
        Path(folder, name).parent.mkdir(exist_ok=True, parents=True)  # of a/test
        once = EachTextOnce(encoder)
        result = evaluated(once, task, batch_size, bf16, prediction_folder=folder)
        cosines, gold = _predicted(task, Path(folder))
    [row] = [row for rows in result.scores.values() for row in rows]
    score = float(row["cosine_spearman"]) * 100
    if not math.isfinite(score):
        raise UserError(f"{KEY}: {name} scores {score}; are its scores all equal?")
    return {
        "score": score,
        "interval": interval(100 * correlations(cosines, gold, RESAMPLES)),
        "source": {**task.metadata.dataset, "subset": row["hf_subset"]},
        "truncated": cut,
    }


def _key(
    encoder: SentenceTransformer, batch_size: int, bf16: Setting, route: str
) -> dict[str, Any]:
    """All that an encoder's scores depend on, but for the tasks."""
    model: Any = encoder[0].model
    form = [str(encoder), encoder.prompts, encoder.default_prompt_name, encoder.max_seq_length]
    return resume_key(model, digest(encoder.state_dict().items())) | {
        "form": digest_of_rows([*form, digest_of_tokenizer(encoder.tokenizer)]),
        "batch_size": batch_size,
        "bf16": uses_bfloat16(bf16, encoder.device),
        "route": route,
        "mteb": mteb.__version__,
    }


class EachTextOnce(SentenceTransformerEncoderWrapper):
    """mteb's own encoder for one task, except that a text of several pairs is encoded once.

    Of the texts in the seven usual English sets a quarter are repeats; in SICK-R they are half.
    """

    def __init__(self, encoder: SentenceTransformer):
        with quiet():
            super().__init__(encoder)
        self.device = encoder.device
        self._vectors: dict[str, np.ndarray] = {}

    def encode(self, inputs: DataLoader, **keys: Any) -> np.ndarray:
        """Vectors [texts, dimensions] of a column of a task."""
        texts = [text for batch in inputs for text in batch["text"]]
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            rows: Any = Dataset.from_dict({"text": new})
            vectors = super().encode(DataLoader(rows, batch_size=len(new)), **keys)
            self._vectors.update(zip(new, vectors, strict=True))
        return np.stack([self._vectors[text] for text in texts])


def _predicted(task: AbsTaskSTS, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each pair, as mteb left it in a folder, and its gold score."""
    [file] = folder.rglob("*.json")
    [[subset, predictions]] = [
        item for item in json.loads(file.read_text()).items() if item[0] != "mteb_model_meta"
    ]
    [[split, scores]] = predictions.items()
    data: Any = task.dataset
    gold = data.get(subset, data)[split]["score"]
    return np.array(scores["cosine_scores"], dtype=float), np.array(gold, dtype=float)


def truncated_texts(encoder: SentenceTransformer, task: AbsTaskSTS) -> int:
    """How many texts of a task are longer than the encoder's limit, and so are cut.

    Raises UserError for a task whose data cannot be had, and, naming the row, for a token that the
    model lacks.
    """
    load_data(task, KEY)
    data: Any = task.dataset
    limit, count = encoder.max_seq_length or math.inf, 0
    prompt = prompt_of(encoder, task.metadata)
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            rows = data.get(subset, data)[split]
            for column in task.column_names:
                texts = list(rows[column])
                where = f"{KEY}: {task.metadata.name}, {split}, {column}, row"
                count += sum(length > limit for length in lengths(encoder, texts, where, prompt))
    return count


def sts_tasks(names: Sequence[str]) -> list[AbsTaskSTS]:
    """The tasks of each name, each once: an mteb task, a local file, the word tiny, or the STS
    tasks of an mteb benchmark, as eng. No two are called alike.

    A local file is called by its stem; where something else has that name, by its folder, too.
    Raises UserError.
    """
    called = local_names([Path(name) for name in names if is_file(name)])
    tasks: dict[str, AbsTaskSTS] = {}
    for name in names:
        several = [] if name == "tiny" or is_file(name) else _of_benchmark(name)
        for task in several or [sts_task(name, called.get(Path(name), ""))]:
            tasks.setdefault(task.metadata.name, task)
    return list(tasks.values())


def _of_benchmark(name: str) -> list[AbsTaskSTS]:
    """The STS tasks of an mteb benchmark; [] of another name. Raises UserError for one without."""
    try:
        tasks = benchmark_named(name)
    except KeyError:
        return []
    of_sts = [_of_one_set(task) for task in tasks if isinstance(task, AbsTaskSTS)]
    if not of_sts:
        raise UserError(f"{KEY}: {name} has no STS task; expected a benchmark with some, as eng")
    return of_sts


def local_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Names of local files: the shortest end of the path that is unique.

    Raises UserError for one file that is named twice.
    """
    parts = {path: _without_suffix(path.resolve()).parts for path in paths}
    names: dict[Path, str] = {}
    for path, path_parts in parts.items():
        others = [other for sibling, other in parts.items() if sibling != path]
        if path_parts in others:
            raise UserError(f"{KEY}: {path} is named twice; name it once")
        ends = range(2 if _is_taken(path_parts[-1]) else 1, len(path_parts))
        free = (end for end in ends if all(other[-end:] != path_parts[-end:] for other in others))
        names[path] = "/".join(path_parts[-next(free, len(path_parts)) :])
    return names


def _without_suffix(path: Path) -> Path:
    """a/pairs of a/pairs.tsv and a/pairs.jsonl.gz."""
    return Path(str(path).removesuffix(GZIPPED)).with_suffix("")


def _is_taken(name: str) -> bool:
    """Whether a name means something without any file."""
    with suppress(UserError):
        return name in ("tiny", *ENGLISH) or bool(task_named(name, KEY, ""))
    return False


def sts_task(name: str, called: str = "") -> AbsTaskSTS:
    """An mteb task from its name, a local file or the word tiny. Raises UserError.

    called: what a local file is called in the result; empty: by its stem.
    """
    if name == "tiny":
        pairs = language.pairs(sizes.STS_PAIRS, TINY_SEED)
        rows = [pair._asdict() for pair in pairs]
        return local_task("tiny", rows, f"seed {TINY_SEED}")
    if is_file(name):
        path = Path(name)
        rows = read_pairs(path)
        revision = hashlib.sha256(read_bytes(path, DATA)).hexdigest()
        return local_task(called or _without_suffix(path).name, rows, revision)
    task = task_named(name, KEY, "no mteb task and no local file")
    if not isinstance(task, AbsTaskSTS):
        raise UserError(f"{KEY}: {name} is a {task.metadata.type} task; expected an STS task")
    if name in SUBSETS:
        task.hf_subsets = SUBSETS[name]
    return _of_one_set(task)


def _of_one_set(task: AbsTaskSTS) -> AbsTaskSTS:
    if len(task.hf_subsets) != 1:
        raise UserError(
            f"{KEY}: {task.metadata.name} is {len(task.hf_subsets)} data sets "
            f"({listed(task.hf_subsets)}); expected a task of one"
        )
    return task


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows of a local file with columns score, sentence1 and sentence2; further ones are passed
    over. Of a .tsv nothing is quoted. Raises UserError naming file and line.
    """
    rows = list(usable(_pair, read_rows(str(path), ragged=True)))
    if len(rows) < 2:
        raise UserError(f"{path}: {len(rows)} pairs; expected two rows at least, under a header")
    return rows


def _pair(row: Row) -> dict[str, Any]:
    given = row.fields.get("score")
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    score = finite_number(row.where, repr(given) if is_number else cell(row, ["score"]), "score")
    return {"score": score} | {name: cell(row, [name]) for name in ("sentence1", "sentence2")}


def local_task(name: str, rows: list[dict[str, Any]], revision: str) -> AbsTaskSTS:
    """An mteb STS task over rows of our own."""

    class LocalSTS(AbsTaskSTS):
        metadata = TaskMetadata(
            name=name,
            dataset={"path": name, "revision": revision},
            description="A local file of sentence pairs.",
            type="STS",
            category="t2t",
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )
        max_score = max(1, math.ceil(max(row["score"] for row in rows)))

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
            self.data_loaded = True

    return LocalSTS()
