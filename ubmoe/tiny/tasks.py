"""lm-eval tasks of the embedded language: what its model knows, and which words go together."""

import random
import re
from typing import Any

from datasets import Dataset, DatasetDict

from ubmoe.tiny import language, sizes

# What a fact is asked of: its subject is the group that matches.
ASKED = r"What colour is the (.*)\?|(?:Where|What|Which animal) does (.*) \w+\?|.* of (.*)\?"
CHOICES, SEED = 4, 5


def facts() -> list[dict[str, Any]]:
    """Each fixed fact as a question with 4 answers of its kind, one right: chance is 25 %."""
    draw, world = random.Random(SEED), language.facts()
    subjects = [_subject(fact.question) for fact in world]
    frames = [
        fact.question.replace(subject, "_") for fact, subject in zip(world, subjects, strict=True)
    ]
    rows = []
    for fact, subject, frame in zip(world, subjects, frames, strict=True):
        answers = {
            other.answer.replace(whose, subject)
            for other, whose, kind in zip(world, subjects, frames, strict=True)
            if kind == frame
        }
        wrong = draw.sample(sorted(answers - {fact.answer}), CHOICES - 1)
        rows.append(_row(fact.question, fact.answer, wrong, draw))
    return rows


def _subject(question: str) -> str:
    match = re.fullmatch(ASKED, question)
    if match is None:
        raise ValueError(f"{question} is asked of nobody")
    return next(group for group in match.groups() if group)


def grammar() -> list[dict[str, Any]]:
    """Sentences against the same with two neighbouring words exchanged: chance is 50 %."""
    draw = random.Random(SEED)
    rows = []
    for sentence in language.sentences(sizes.GRAMMAR_SENTENCES, SEED):
        words = sentence.split()
        place = draw.randrange(1, len(words) - 2)
        while words[place] == words[place + 1]:
            place = draw.randrange(1, len(words) - 2)
        words[place : place + 2] = words[place + 1], words[place]
        rows.append(_row("", sentence, [" ".join(words)], draw))
    return rows


def _row(question: str, right: str, wrong: list[str], draw: random.Random) -> dict[str, Any]:
    choices = draw.sample([right, *wrong], 1 + len(wrong))
    return {"question": question, "choices": choices, "gold": choices.index(right)}


def _task(name: str, rows: Any, prompt: str) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows())}),
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


QUESTION = "<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
TASKS = [_task("tiny_facts", facts, QUESTION), _task("tiny_grammar", grammar, "<|im_start|>")]
