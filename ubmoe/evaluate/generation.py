"""Generation scores by lm-eval, and the perplexity of held-out answers.

A bidirectional model is refused: its likelihoods would read the future.
"""

import logging
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bidirectional import is_bidirectional
from ubmoe.bootstrap import interval, means
from ubmoe.bounds import read_text
from ubmoe.config import (
    TABLE4,
    TASKS_OF_BITUNE,
    Config,
    EvaluationSection,
    UserError,
    error_reason,
    shipped,
)
from ubmoe.data.chats import Chat, collate, read_chats
from ubmoe.data.padding import batches_by_length
from ubmoe.data.rows import spaced
from ubmoe.models.loading import load_model
from ubmoe.models.precision import Setting, autocast
from ubmoe.models.source import ModelSource
from ubmoe.tiny import tasks as tiny_tasks
from ubmoe.training import losses

BATCH_TOKENS = 8192  # padded tokens of a forward, for perplexity; fewer of a large vocabulary:
LOGITS = 2**28  # of a forward at most, which are a GB in float32, and the loss makes two or three
# Metrics of lm-eval that are shares of 1, and tasks whose metrics are percent already.
SHARES = re.compile(r"acc|^exact_match|^em$|^f1$|^mcc$|^pass@|^mc[12]$")
PERCENT = ("squadv2", "scrolls", "longbench")
OWN = {*TABLE4, *TASKS_OF_BITUNE}  # of lm-eval's tasks those in tables: listing all takes seconds


@cache
def manager() -> Any:
    """lm-eval's own tasks, their list read once: it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_tasks(names: list[str], data: str = "") -> None:
    """Raises UserError for a name that is no lm-eval task, no task YAML and not tiny.

    And for two things of one name, of which only one would be scored. data: the folder that {data}
    in a task YAML stands for.
    """
    result_names(names)
    for name in names:
        if name.endswith((".yaml", ".yml")):
            _check_yaml(shipped(name), data)
        elif name != "tiny" and name in manager().all_tags:
            raise UserError(
                f"evaluation.generation: {name} is a tag of several tasks; name the tasks"
            )
        elif name != "tiny" and name not in manager().all_tasks:
            close = get_close_matches(name, manager().all_tasks, 3)
            near = (
                f"did you mean {' or '.join(close)}?" if close else "expected one, a YAML or tiny"
            )
            raise UserError(f"evaluation.generation: {name}: no lm-eval task; {near}")


def _name_in(path: Path) -> str:
    """The name that a task YAML gives its task. Raises UserError for none, and for a group."""

    class Loader(yaml.SafeLoader):
        """Passes over lm-eval's own tags, such as !function."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        name = yaml.load(read_text(path), Loader=Loader)["task"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = error_reason(error)
        raise UserError(
            f"evaluation.generation: {path}: no lm-eval task YAML with a task: name ({reason})"
        ) from error
    if not isinstance(name, str):
        raise UserError(f"evaluation.generation: {path} is a group; name its tasks, or their YAMLs")
    return name


def _check_yaml(path: Path, data: str) -> None:
    """Build the task, its data too: what is wrong with it should not wait until it is scored."""
    from lm_eval.tasks import TaskManager, get_task_dict

    _name_in(path)
    try:
        with redirect_stdout(sys.stderr):
            get_task_dict([task_of(path, data)], TaskManager(include_defaults=False))
    except UserError:
        raise
    except Exception as error:  # lm-eval raises nearly every type here
        raise UserError(
            f"evaluation.generation: {path}: no lm-eval task ({error_reason(error)})"
        ) from error


PLACE = "{data}"  # in a task YAML's dataset_kwargs


def task_of(path: Path, data: str) -> Any:
    """A YAML's task for lm-eval: its path, or its keys with the folder of the data in them.

    Raises UserError where the YAML needs a folder and none is named.
    """
    if PLACE not in read_text(path):
        return str(path)
    if not data:
        raise UserError(
            f"evaluation.data: {path} reads local files; name the folder that holds them"
        )
    if not Path(data).is_dir():
        raise UserError(f"evaluation.data: {data} is no folder; expected the benchmark files")
    from lm_eval.tasks._yaml_loader import load_yaml  # which knows !function

    keys = load_yaml(path, resolve_func=True)
    given = keys.get("dataset_kwargs") or {}
    keys["dataset_kwargs"] = {
        key: value.replace(PLACE, data) if isinstance(value, str) else value
        for key, value in given.items()
    }
    return keys


def check_causal(model: PreTrainedModel) -> None:
    if is_bidirectional(model.config):
        raise UserError(
            f"evaluation.generation: {model.name_or_path} is bidirectional: its likelihoods would "
            "read the future; expected a causal model, or is_causal=True"
        )


def generation_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSection,
    lm: Any = None,
) -> dict[str, Any]:
    """Every metric of every task, in percent, and the average of the tasks' main metrics.

    The main metric of a task is the first that its YAML names; a group's is acc. `questions` has
    its value for each question, so that models can be compared question by question; `stderr` is
    theirs. lm: lm-eval's model; None: transformers' causal forward and generate.
    Raises UserError for a bidirectional model and for a score that is not finite: it is never
    averaged.
    """
    check_causal(model)
    metadata = {
        "lm_eval": version("lm_eval"),
        "apply_chat_template": settings.apply_chat_template,
        "limit": settings.limit,
    }
    if not settings.generation:
        nothing: dict[str, Any] = {name: {} for name in ("tasks", "metrics", "questions", "stderr")}
        return {**nothing, "average": None, **metadata}
    with redirect_stdout(sys.stderr), warned_once("lm_eval"):
        if lm is None:
            from ubmoe.evaluate.harness import SharedPrefixLM

            lm = SharedPrefixLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                softmax_dtype="float32",  # of logits that autocast made
                trust_remote_code=False,
            )
        with autocast(settings.bf16, model.device):
            evaluated = _evaluated(lm, settings)
    tasks, metrics = {}, {}
    for name in result_names(settings.generation):
        tasks[name] = percent(name, evaluated["results"][name])
        metrics[name] = _main_metric(evaluated["configs"].get(name), tasks[name])
    for name, metric in metrics.items():
        if not math.isfinite(tasks[name].get(metric, math.nan)):
            raise UserError(f"evaluation.generation: {name} has no finite {metric}: {tasks[name]}")
    average = sum(tasks[name][metric] for name, metric in metrics.items()) / len(tasks)
    questions = {
        name: item for name in tasks if (item := _by_question(evaluated, name, metrics[name]))
    }
    stderr = {
        name: 100 * statistics.stdev(values) / math.sqrt(len(values))
        for name, values in questions.items()
        if len(values) > 1 and SHARES.search(metrics[name])
    }
    shots = {name: evaluated["n-shot"].get(name) for name in tasks}
    versions = {name: evaluated["versions"].get(name) for name in tasks}
    metadata["truncated"] = dict(lm.truncated)  # prompts whose beginning was cut, by task
    return {
        **{"tasks": tasks, "metrics": metrics, "average": average},
        **{"questions": questions, "stderr": stderr},
        **{"shots": shots, "versions": versions, **metadata},
    }


def _by_question(evaluated: dict[str, Any], name: str, metric: str) -> list[float]:
    """A task's main metric of each question, in their order; [] of a group, and of a corpus's."""
    samples = evaluated["samples"].get(name) or []
    # reversed, so that the first filter's value is the one that stays
    kept = {sample["doc_id"]: sample.get(metric) for sample in reversed(samples)}
    values = [kept[number] for number in sorted(kept)]
    if not all(isinstance(value, int | float) for value in values):
        return []
    return [round(float(value), 6) for value in values]


WARNED: dict[str, logging.LogRecord] = {}  # warnings already shown, by their text
# What lm-eval warns of in all our runs: a model that is loaded already, and tasks that are objects.
MEANT = re.compile("`pretrained` model kwarg|Passed an already-initialized|.*Custom kwargs can be")


@contextmanager
def warned_once(library: str) -> Iterator[None]:
    """A library's warnings, each once a process, whatever its numbers; none of what is MEANT."""

    def once(record: logging.LogRecord) -> bool:
        message = re.sub(r"\d+", "N", record.getMessage())
        ours = record.name.partition(".")[0] == library
        if not ours or MEANT.match(message):
            return not ours
        return WARNED.setdefault(message, record) is record  # for every handler

    logger, handlers = logging.getLogger(library), logging.getLogger().handlers[:]
    logger.setLevel(logging.WARNING)
    for handler in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(once)


def _evaluated(lm: Any, settings: EvaluationSection) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    asked = settings.generation
    theirs = any(not name.endswith((".yaml", ".yml")) and name != "tiny" for name in asked)
    tasks: list[Any] = [
        task
        for name in asked
        for task in (tiny_tasks.TASKS if name == "tiny" else [_task_or_name(name, settings.data)])
    ]
    try:
        # The result has our own commit, and git prints an error outside of a repository.
        with patch.object(evaluator, "get_git_commit_hash", return_value=None):
            results = evaluator.simple_evaluate(
                lm,
                tasks=tasks,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                task_manager=manager() if theirs else TaskManager(include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
    except (OSError, KeyError, TypeError, ValueError, AssertionError) as error:
        # a data set that is not here, and no network; or a task that is wrong in itself
        reason = error_reason(error)
        raise UserError(f"evaluation.generation: {', '.join(asked)}: {reason}") from error
    return dict(results or {})


def _task_or_name(name: str, data: str) -> Any:
    return task_of(shipped(name), data) if name.endswith((".yaml", ".yml")) else name


def result_names(asked: list[str]) -> dict[str, str]:
    """{name in the result: what was asked for}. Raises UserError for two things of one name.

    A YAML may not call its task as lm-eval calls one of its own, either: its score would stand in
    that one's column.
    """
    names: dict[str, str] = {}
    for task in asked:
        is_file = task.endswith((".yaml", ".yml"))
        for name in _names_of(task):
            other = names.setdefault(name, task)
            if other != task:
                raise UserError(
                    f"evaluation.generation: {task} and {other} are both called {name}; expected "
                    "a task: of its own in each YAML"
                )
            if is_file and name in OWN:
                raise UserError(
                    f"evaluation.generation: {task} is called {name}, as a task of lm-eval; "
                    f"expected another task:, as {name}_local"
                )
    return names


def _names_of(asked: str) -> list[str]:
    if asked == "tiny":
        return [str(task["task"]) for task in tiny_tasks.TASKS]
    return [_name_in(shipped(asked))] if asked.endswith((".yaml", ".yml")) else [asked]


def percent(task: str, result: dict[str, Any]) -> dict[str, float]:
    """{metric: value}; known shares as percent, standard errors and filters' names left out."""
    scores: dict[str, float] = {}
    for key, value in result.items():
        metric = key.split(",")[0]
        if isinstance(value, int | float) and not metric.endswith("_stderr") and "," in key:
            share = SHARES.search(metric) and abs(value) <= 1 and not task.startswith(PERCENT)
            scores.setdefault(metric, value * (100 if share else 1))
    return scores


def _main_metric(task: Any, scores: dict[str, float]) -> str:
    named = [metric["metric"] for metric in (task or {}).get("metric_list") or []]
    return next((str(name) for name in [*named, "acc", *scores] if name in scores), "acc")


def perplexity(
    model: PreTrainedModel, chats: Sequence[Chat], bf16: Setting = False
) -> dict[str, Any]:
    """`perplexity_of` the answers' tokens, end tokens included. Raises UserError for a
    bidirectional model.
    """
    check_causal(model)
    head: Any = model.get_output_embeddings()

    def predicted(batch: list[int]) -> tuple[Tensor, Tensor]:
        inputs = collate([chats[index] for index in batch])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        return losses.predictions(model, head, inputs, inputs.pop("labels"))

    tokens = [sum(chat.answer[1:]) for chat in chats]  # nothing predicts a first token
    with torch.no_grad(), autocast(bf16, model.device):
        return perplexity_of(predicted, [chat.ids for chat in chats], tokens, head)


def perplexity_of(
    predicted: Callable[[list[int]], tuple[Tensor, Tensor]],
    texts: list[list[int]],
    tokens: Sequence[int],
    head: Any,
) -> dict[str, Any]:
    """A perplexity, its interval, and each text's part of it.

    predicted: (M, V) logits and M labels of the texts of a batch, in their order; tokens: labels of
    each text; head: what gives V logits. `perplexity_interval`: 95 %, by the bootstrap over texts.
    `answers`: the summed negative log-likelihood of each text, in nats, and its tokens.
    """
    counts, lost = np.array(tokens), np.zeros(len(tokens))
    most = min(BATCH_TOKENS, LOGITS // head.weight.shape[0])
    for batch in tqdm(batches_by_length(texts, most), desc="perplexity", disable=None, leave=False):
        token_losses = cross_entropy(*predicted(batch), reduction="none").cpu()
        lost[batch] = [
            text_losses.sum().item() for text_losses in token_losses.split(counts[batch].tolist())
        ]
    return {
        "perplexity": math.exp(lost.sum() / counts.sum()),
        "perplexity_interval": interval(np.exp(means(lost, counts))),
        "answers": {"losses": lost.round(4).tolist(), "tokens": counts.tolist()},
    }


def held_out_chats(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Chat]:
    """The chats whose answers' perplexity is measured. config: within the model's context."""
    settings = config.ubmoe
    chats = read_chats(settings.dataset, tokenizer, settings.max_tokens, settings.max_rows)
    return chats.held_out(settings.held_out, "ubmoe.held_out")[1]


def language_model_scores(config: Config, source: ModelSource) -> dict[str, Any]:
    """Generation tasks and perplexity of held-out chats, read causally whatever its own mask.

    source: of the config's model.

    `further`: {file or id: `perplexity_of` its answers} for those of `evaluation.perplexity`.
    """
    check_tasks(config.evaluation.generation, config.evaluation.data)
    config = source.within_context(config, "ubmoe")
    settings, tokenizer = config.ubmoe, source.tokenizer
    kept, further = held_out_chats(config, tokenizer), _further_chats(config, tokenizer)
    model = load_model(source)
    scores = generation_scores(model, tokenizer, config.evaluation)
    counts = {"held_out": len(kept), "max_tokens": settings.max_tokens}
    counts["truncated"] = sum(chat.cut for chat in kept)
    scored, *others = (
        perplexity(model, chats, config.evaluation.bf16) for chats in (kept, *further.values())
    )
    more = dict(zip(further, others, strict=True))
    return scores | scored | ({"further": more} if more else {}) | {"counts": counts}


def _further_chats(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Sequence[Chat]]:
    """Those of `evaluation.perplexity`, evenly spaced, by their names."""
    settings, by_name = config.ubmoe, {}
    for dataset in config.evaluation.perplexity:
        name = Path(dataset).stem
        if name in by_name:
            raise UserError(
                f"evaluation.perplexity: two are called {name}; expected names that differ"
            )
        chats = read_chats(dataset, tokenizer, settings.max_tokens).chats
        by_name[name] = spaced(chats, settings.held_out)
    return by_name
