"""mteb's tasks of every type and its benchmarks, by mteb's own names, metrics and means.

A benchmark goes by its name, as `MTEB(eng, v2)`; the word eng stands for that one.
"""

import logging
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import mteb
from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata, TaskType
from mteb.models.abs_encoder import get_prompt_name
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer

from ubmoe.config import UserError, error_reason
from ubmoe.encoder.sentence_encoder import SIDES, own_prompt
from ubmoe.models.precision import Setting, autocast

log = logging.getLogger(__name__)
KEY = "evaluation.mteb"
ENGLISH = {"eng": "MTEB(eng, v2)"}
TYPES = get_args(TaskType)  # as STS and Retrieval


def task_named(name: str, key: str, missing: str, suggestion: str = "") -> AbsTask:
    """mteb's task of a name. Raises UserError, `key: name: missing`, where there is none.

    suggestion: what to add; empty: the task that mteb takes for meant.
    """
    try:
        [task] = mteb.get_tasks(tasks=[name], languages=None, exclude_superseded=False)
    except (KeyError, ValueError) as error:
        raise UserError(f"{key}: {name}: {missing}{suggestion or _suggestion(error)}") from error
    return task


def benchmark_named(name: str) -> list[AbsTask]:
    """The tasks of mteb's benchmark of a name, or of the word eng. Raises KeyError."""
    return list(mteb.get_benchmark(ENGLISH.get(name, name)).tasks)


def _suggestion(error: Exception) -> str:
    """The name that mteb takes for meant, in the words of our messages."""
    close = re.search(r"Did you mean: '?([^'?]+)'?\?", str(error))
    return f"; did you mean {close[1]}?" if close else ""


def mteb_tasks(names: Sequence[str]) -> list[AbsTask]:
    """The tasks of `evaluation.mteb`, each once. Raises UserError for what cannot be scored."""
    tasks: dict[str, AbsTask] = {}
    for name in names:
        for task in _tasks_of(name):
            tasks.setdefault(task.metadata.name, task)
    for name, task in tasks.items():
        if task.metadata.modalities != ["text"]:
            kinds = ", ".join(task.metadata.modalities)
            raise UserError(f"{KEY}: {name} is of {kinds}; expected tasks of text alone")
    return list(tasks.values())


def _tasks_of(name: str) -> list[AbsTask]:
    try:
        return benchmark_named(name)
    except KeyError as error:
        suggestion = _suggestion(error)
    return [task_named(name, KEY, "no task and no benchmark of mteb", suggestion)]


def mteb_scores(
    encoder: SentenceTransformer, tasks: Iterable[AbsTask], batch_size: int, bf16: Setting = False
) -> dict[str, Any]:
    """The `mteb` section: each task's main score x 100, their mean, and the mean of types' means.

    As mteb's own leaderboard has them. Raises UserError where a task's data cannot be had, and for
    a score that is not finite.
    """
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        data = task.metadata
        score = _score(encoder, task, batch_size, bf16)
        if not math.isfinite(score):
            raise UserError(f"{KEY}: {data.name} scores {score}; expected a number")
        rows[data.name] = {"type": data.type, "metric": data.main_score, "score": score}
        log.info("%s (%s): %.2f", data.name, data.type, score)
    by_type: dict[str, list[float]] = {}
    for row in rows.values():
        by_type.setdefault(row["type"], []).append(row["score"])
    types = {kind: statistics.fmean(scores) for kind, scores in by_type.items()}
    return {
        **{"unit": "main score x 100", "tasks": rows, "types": types},
        "average": statistics.fmean(row["score"] for row in rows.values()),
        "average_of_types": statistics.fmean(types.values()),
        "mteb": mteb.__version__,
    }


def load_data(task: AbsTask, key: str) -> None:
    """Raises UserError, at the key that names the task, where its data cannot be had."""
    try:
        task.load_data()
    except OSError as error:
        said = error_reason(error)
        raise UserError(f"{key}: {task.metadata.name} cannot be loaded ({said})") from error


def _score(
    encoder: SentenceTransformer, task: AbsTask, batch_size: int, bf16: Setting = False
) -> float:
    try:
        result = evaluated(encoder, task, batch_size, bf16)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{KEY}: {task.metadata.name}: {error_reason(error)}") from error
    return 100 * float(result.get_score())


def evaluated(
    encoder: Any, task: AbsTask, batch_size: int, bf16: Setting, **keys: Any
) -> TaskResult:
    """mteb's result of a task, without its cache. encoder: a SentenceTransformer, or mteb's wrapper
    of one with its device; keys: of mteb.evaluate.
    """
    with quiet(), autocast(bf16, encoder.device):
        result = mteb.evaluate(
            encoder,
            task,
            cache=None,
            encode_kwargs={"batch_size": batch_size},
            show_progress_bar=False,
            **keys,
        )
    return result.task_results[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Hides mteb's warnings: of its own use of older names, and of prompts that are no task's."""
    logger = logging.getLogger("mteb")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- instructions ---------------------------------------------------------------------------------


def check_instructions(instructions: Iterable[str]) -> None:
    """Raises UserError for a name that mteb looks up for no task.

    It looks up a task, a type of tasks, query, document, and either of the first two with -query or
    -document behind it.
    """
    for name in instructions:
        base, _, side = name.rpartition("-")
        base = base if side in SIDES and base else name
        if base not in (*TYPES, *SIDES):
            missing = "no task of mteb, no type of tasks as STS, not query and not document"
            task_named(base, "bi.instructions", missing)


def prompt_of(encoder: SentenceTransformer, task: TaskMetadata) -> str | None:
    """The prompt that mteb chooses for the texts of a task without queries, as STS."""
    prompts = {name: prompt for name, prompt in encoder.prompts.items() if prompt is not None}
    name = get_prompt_name(prompts, task, None)
    return own_prompt(encoder) if name is None else prompts[name]
