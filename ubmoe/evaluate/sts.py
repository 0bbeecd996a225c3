"""STS scores by mteb: its own tasks, local files, and the embedded language's pairs.

mteb keys its cache by model name and gives every local model the same one, so the second of two
would get the first one's scores: no cache is used, and every run is named by itself.
"""

import csv
import hashlib
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from ubmoe.config import Config, UserError
from ubmoe.recording import recording
from ubmoe.tiny import language

log = logging.getLogger(__name__)
TINY_PAIRS, TINY_SEED = 1500, 2  # of the embedded language
SUBSETS = {"STS17": ["en-en"], "STS22": ["en"]}  # the English ones, as in the paper's Table 2


def sts_scores(
    encoder: SentenceTransformer, tasks: list[AbsTaskSTS], batch_size: int
) -> dict[str, Any]:
    """The `sts` section: Spearman correlation of cosines x 100 by task, their average, and sources.

    Raises UserError for a score that is not finite: it is never averaged.
    """
    scores, sources = {}, {}
    for task in tasks:
        with warnings.catch_warnings():
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
    return {"tasks": scores, "average": average, "sources": sources, "mteb": mteb.__version__}


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

    Raises UserError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected an STS file") from error
    reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    rows = []
    for row in reader:
        where = f"{path}:{reader.line_num}"
        try:
            score = float(row["score"])
            sentences = {name: row[name].strip() for name in PAIR}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: expected score, sentence1, sentence2 ({error})") from error
        if not math.isfinite(score) or not all(sentences.values()):
            raise UserError(f"{where}: an empty sentence or a score that is no number")
        rows.append({"score": score, **sentences})
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


def load_encoder(config: Config) -> SentenceTransformer:
    """Any encoder that sentence-transformers knows, or else a causal LM in the form of `bi`."""
    from sentence_transformers.util import is_sentence_transformer_model

    from ubmoe.encoder.sentence_encoder import as_encoder
    from ubmoe.models.loading import best_device, load_model, load_tokenizer, source
    from ubmoe.models.lora import attention_of

    device, name = best_device(config.model.device), source(config.model)
    wanted = config.bi.attention
    if is_sentence_transformer_model(name, revision=config.model.revision):
        if config.model.adapter:
            raise UserError(
                f"model.adapter: {config.model.name} is an encoder of sentence-transformers; "
                "expected null, or a causal language model as model.name"
            )
        return SentenceTransformer(
            name,
            device=str(device),
            revision=config.model.revision,
            model_kwargs={"dtype": config.model.dtype},
        )
    if config.model.adapter and (trained := attention_of(config.model.adapter)) != wanted:
        raise UserError(
            f"bi.attention: the adapter was trained {trained}, not {wanted}; expected "
            f"bi.attention={trained}"
        )
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, bidirectional=wanted == "bidirectional")
    return as_encoder(model, tokenizer, config.bi)


def generation_of(config: Config) -> dict[str, Any]:
    """Generation tasks and perplexity of held-out chats, read causally whatever its own mask."""
    from ubmoe.data.chats import read_chats
    from ubmoe.data.rows import held_out
    from ubmoe.evaluate import generation
    from ubmoe.models.loading import load_model, load_tokenizer

    generation.check_tasks(config.evaluation.generation)
    settings, tokenizer = config.ubmoe, load_tokenizer(config.model)
    found = read_chats(settings.dataset, tokenizer, settings.max_tokens, settings.max_rows)
    _, kept = held_out(found.chats, settings.held_out, "ubmoe.held_out")
    model = load_model(config.model)
    scores = generation.generation_scores(model, tokenizer, config.evaluation)
    return {**scores, "perplexity": generation.perplexity(model, kept)}


def main(config: Config) -> Path:
    with recording("evaluate", "evaluation", config) as run:
        tasks = [sts_task(name) for name in config.evaluation.sts]
        if config.evaluation.language_model:
            run.more = {"generation": generation_of(config)}
        encoder = load_encoder(config)
        run.section = sts_scores(encoder, tasks, config.evaluation.batch_size)
        run.model = encoder[0].model
    return run.path
