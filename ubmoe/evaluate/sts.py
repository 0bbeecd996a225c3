"""STS scores by mteb: its own tasks, local files, and the embedded language's pairs.

mteb keys its cache by model name and gives every local model the same one, so the second of two
would get the first one's scores: no cache is used, and every run is named by itself.
"""

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from ubmoe.config import UserError
from ubmoe.data.rows import cell, decoded, finite_number, table_rows
from ubmoe.encoder.sentence_encoder import lengths
from ubmoe.models.precision import Setting, autocast
from ubmoe.tiny import language

TINY_PAIRS, TINY_SEED = 1500, 2  # of the embedded language
SUBSETS = {"STS17": ["en-en"], "STS22": ["en"]}  # the English ones, as in the paper's Table 2


def sts_scores(
    encoder: SentenceTransformer,
    tasks: list[AbsTaskSTS],
    batch_size: int,
    bf16: Setting = False,
) -> dict[str, Any]:
    """The `sts` section: Spearman correlation of cosines x 100 by task, their average, and sources.

    Raises UserError for a score that is not finite: it is never averaged.
    """
    scores, sources, cut = {}, {}, {}
    for task in tasks:
        cut[task.metadata.name] = truncated_texts(encoder, task)
        with warnings.catch_warnings(), autocast(bf16, encoder.device):
            warnings.simplefilter("ignore", FutureWarning)  # mteb's own use of older names
            result = mteb.evaluate(
                encoder,
                task,
                cache=None,
                encode_kwargs={"batch_size": batch_size},
                show_progress_bar=False,
            )
        [row] = [row for rows in result.task_results[0].scores.values() for row in rows]
        name, score = task.metadata.name, float(row["cosine_spearman"]) * 100
        if not math.isfinite(score):
            raise UserError(f"evaluation.sts: {name} scores {score}; are its scores all equal?")
        scores[name] = score
        sources[name] = {**task.metadata.dataset, "subset": row["hf_subset"]}
    average = sum(scores.values()) / len(scores) if scores else None
    return {
        **{"tasks": scores, "average": average, "sources": sources, "truncated": cut},
        **{"max_tokens": encoder.max_seq_length, "mteb": mteb.__version__},
    }


def truncated_texts(encoder: SentenceTransformer, task: AbsTaskSTS) -> int:
    """How many texts of a task are longer than the encoder's limit, and so are cut.

    Raises UserError, naming the row, for a token that the model lacks.
    """
    task.load_data()
    data: Any = task.dataset
    limit, found = encoder.max_seq_length or math.inf, 0
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            rows = data.get(subset, data)[split]
            for column in task.column_names:
                texts = list(rows[column])
                where = f"evaluation.sts: {task.metadata.name}, {split}, {column}, row"
                found += sum(each > limit for each in lengths(encoder, texts, where))
    return found


def sts_task(name: str) -> AbsTaskSTS:
    """An mteb task from its name, a local file or the word tiny. Raises UserError."""
    if name == "tiny":
        pairs = language.pairs(TINY_PAIRS, TINY_SEED)
        rows = [pair._asdict() for pair in pairs]
        return local_task("tiny", rows, f"seed {TINY_SEED}")
    if name.endswith(".tsv"):
        path = Path(name)
        revision = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        return local_task(path.stem, read_pairs(path), revision)
    try:
        [task] = mteb.get_tasks(tasks=[name], languages=None, exclude_superseded=False)
    except (KeyError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"evaluation.sts: {name}: no mteb task and no .tsv file ({reason})"
        ) from error
    if not isinstance(task, AbsTaskSTS):
        raise UserError(
            f"evaluation.sts: {name} is a {task.metadata.type} task; expected an STS task"
        )
    if name in SUBSETS:
        task.hf_subsets = SUBSETS[name]
    return task


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows of a tab-separated file with header `score sentence1 sentence2`; nothing is quoted.

    Cells and columns beyond these are passed over. Raises UserError naming file and line.
    """
    rows = [
        {
            "score": finite_number(row.where, cell(row, ["score"]), "score"),
            **{name: cell(row, [name]) for name in PAIR},
        }
        for row in table_rows(path, decoded(path), ragged=True)
    ]
    if len(rows) < 2:
        raise UserError(f"{path}: {len(rows)} pairs; expected a header and at least two rows")
    return rows


PAIR = ("sentence1", "sentence2")


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
