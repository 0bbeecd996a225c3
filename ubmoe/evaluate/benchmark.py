"""What mteb calls things, and its tasks of every kind: its own metrics and means, none of ours.

A benchmark of mteb is named as there, `MTEB(eng, v2)`; the word eng is that one.
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
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from ubmoe.config import UserError, error_reason
from ubmoe.encoder.sentence_encoder import own_prompt
from ubmoe.models.precision import Setting, autocast

log = logging.getLogger(__name__)
ENGLISH = {"eng": "MTEB(eng, v2)"}
ENDINGS = tuple(f"-{each.value}" for each in PromptType)
WORDS = {*get_args(TaskType), *(each.value for each in PromptType)}  # that have a prompt, too


def task_named(name: str, where: str, neither: str) -> AbsTask:
    """mteb's task of a name. Raises UserError, `where: name: neither`, where it has none."""
    try:
        [task] = mteb.get_tasks(tasks=[name], languages=None, exclude_superseded=False)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: {name}: {neither}{_meant(error)}") from error
    return task


def benchmark_named(name: str) -> list[AbsTask]:
    """The tasks of mteb's benchmark of a name, or of the word eng. Raises KeyError."""
    return list(mteb.get_benchmark(ENGLISH.get(name, name)).tasks)


def _meant(error: Exception) -> str:
    """What mteb takes for meant, of its own complaint."""
    close = re.search(r"Did you mean: '?([^'?]+)'?\?", str(error))
    return f"; did you mean {close[1]}?" if close else ""


def mteb_tasks(names: Sequence[str]) -> list[AbsTask]:
    """The tasks of `evaluation.mteb`, each once. Raises UserError for what cannot be scored."""
    found: dict[str, AbsTask] = {}
    for name in names:
        for task in _named(name):
            found.setdefault(task.metadata.name, task)
    for name, task in found.items():
        if task.metadata.modalities != ["text"]:
            said = ", ".join(task.metadata.modalities)
            raise UserError(f"evaluation.mteb: {name} is of {said}; expected tasks of text alone")
    return list(found.values())


def _named(name: str) -> list[AbsTask]:
    try:
        return benchmark_named(name)
    except KeyError as error:
        meant = _meant(error)
    neither = f"no task and no benchmark of mteb{meant}"
    return [task_named(name, "evaluation.mteb", neither)]


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
            raise UserError(f"evaluation.mteb: {data.name} scores {score}; expected a number")
        rows[data.name] = {"type": data.type, "metric": data.main_score, "score": score}
        log.info("%s (%s): %.2f", data.name, data.type, score)
    kinds = dict.fromkeys(row["type"] for row in rows.values())
    types = {
        kind: statistics.fmean(row["score"] for row in rows.values() if row["type"] == kind)
        for kind in kinds
    }
    return {
        **{"unit": "main score x 100", "tasks": rows, "types": types},
        "average": statistics.fmean(row["score"] for row in rows.values()),
        "average_of_types": statistics.fmean(types.values()),
        "mteb": mteb.__version__,
    }


def _score(
    encoder: SentenceTransformer, task: AbsTask, batch_size: int, bf16: Setting = False
) -> float:
    with quiet(), autocast(bf16, encoder.device):
        try:
            result = mteb.evaluate(
                encoder,
                task,
                cache=None,
                encode_kwargs={"batch_size": batch_size},
                show_progress_bar=False,
            )
        except (OSError, ImportError, ValueError) as error:
            said = error_reason(error)
            raise UserError(f"evaluation.mteb: {task.metadata.name}: {said}") from error
    return 100 * float(result.task_results[0].get_score())


@contextmanager
def quiet() -> Iterator[None]:
    """Without mteb's warnings of its own use of older names, and of prompts that are no task's."""
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

    Those are a task, a type of tasks, query or document; each of the first two also with -query or
    -document behind it.
    """
    for name in instructions:
        base = next((name.removesuffix(end) for end in ENDINGS if name.endswith(end)), name)
        if base not in WORDS:
            neither = "no task of mteb, no type of tasks as STS, not query and not document"
            task_named(base, "bi.instructions", neither)


def prompt_of(encoder: SentenceTransformer, task: TaskMetadata) -> str | None:
    """What stands before a text of a task whose texts are all alike, as STS: mteb's own choice."""
    prompts = {name: each for name, each in encoder.prompts.items() if each is not None}
    name = get_prompt_name(prompts, task, None)
    return own_prompt(encoder) if name is None else prompts[name]
