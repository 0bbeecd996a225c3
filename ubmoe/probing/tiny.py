"""The five probing tasks in the embedded language."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from ubmoe.probing.items import FEATURES, Items, Task, bare, text, tokens
from ubmoe.probing.word_vectors import Word
from ubmoe.tiny import language, sizes

TINY_SEED = 21
KINDS = ("person", "animal", "food", "thing")
CONCRETE = {"person": 2.0, "animal": 3.0, "food": 4.0, "thing": 5.0}


def _tiny_context() -> list[Task]:
    """`the N V the N`, every word drawn alone, so that none predicts another."""
    sentences = []
    for feature, target in FEATURES.items():
        rng = random.Random(f"{TINY_SEED} {feature}")
        places = [Items() for _ in range(5)]
        for _ in range(2 * sizes.PROBING_ITEMS):
            agent, patient = rng.choices(language.NOUNS, k=2)
            verb = rng.choice(language.VERBS)
            label = {
                "subject_animacy": agent.animate,
                "verb_causative": verb.causative,
                "verb_dynamic": verb.dynamic,
                "object_animacy": patient.animate,
            }[feature]
            said = [rng.choice(concept.words) for concept in (agent, verb, patient)]
            words = tokens("the {} {} the {}".format(*said))
            for items, word in zip(places, words, strict=True):
                items.add((word,), int(label), text(words[target]))
        sentences += [items.task(f"{feature}@{number}") for number, items in enumerate(places, 1)]
    return sentences


@dataclass(frozen=True)
class _Said:
    """A meaning in words, with its verb and nouns found in them."""

    meaning: language.Meaning
    verb: Word
    agent: Word
    patient: Word


def _said(count: int) -> list[_Said]:
    rng, sentences = random.Random(TINY_SEED), []
    for _ in range(count):
        meaning = language.draw(rng)
        wording = tuple(rng.randrange(2) for _ in meaning)
        sentence = language.express(meaning, language.ORDERS[0], wording)
        words = tokens(sentence)
        agent, verb, patient = (
            next(w for w in map(bare, words) if text(w).lower() == concept.words[form])
            for concept, form in (
                (meaning.agent, wording[1]),
                (meaning.verb, wording[2]),
                (meaning.patient, wording[4]),
            )
        )
        sentences.append(_Said(meaning, verb, agent, patient))
    return sentences


def _tiny_aspect() -> list[Task]:
    causative, dynamic = Items(), Items()
    for said in _said(sizes.PROBING_ITEMS):
        verb = said.meaning.verb
        causative.add((said.verb,), int(verb.causative), text(said.verb))
        dynamic.add((said.verb,), int(verb.dynamic), text(said.verb))
    return [causative.task("telicity"), dynamic.task("duration")]


def _tiny_concreteness() -> list[Task]:
    """A noun's kind, and a little of what it does."""
    items = Items()
    for said in _said(sizes.PROBING_ITEMS // 2):
        score = CONCRETE[said.meaning.agent.kind] + 0.5 * said.meaning.verb.dynamic
        items.add((said.agent,), [score], text(said.agent).lower())
    return [items.task("concreteness")]


def _tiny_sensorimotor() -> list[Task]:
    items = Items()
    for said in _said(sizes.PROBING_ITEMS // 2):
        norms = [5.0 * (said.meaning.patient.kind == kind) for kind in KINDS]
        items.add((said.patient,), norms, text(said.patient).lower())
    return [items.task("sensorimotor")]


def _tiny_wic() -> list[Task]:
    """Does a noun do the same in both sentences: act, or suffer?"""
    rng, items = random.Random(TINY_SEED), Items()
    roles: dict[str, tuple[list[Word], list[Word]]] = {}
    for said in _said(sizes.PROBING_ITEMS * 2):
        for role, word in enumerate((said.agent, said.patient)):
            roles.setdefault(text(word).lower(), ([], []))[role].append(word)
    both = sorted(noun for noun, (acts, suffers) in roles.items() if len(acts) > 1 < len(suffers))
    for number in range(sizes.PROBING_ITEMS // 2):
        noun = rng.choice(both)
        acts, suffers = roles[noun]
        same = number % 2
        pair = rng.sample(rng.choice((acts, suffers)), 2)
        if not same:
            pair = [rng.choice(acts), rng.choice(suffers)]
        items.add((pair[0], pair[1]), same, noun)
    return [items.task("word in context")]


TINY: dict[str, Callable[[], list[Task]]] = {
    "context": _tiny_context,
    "aspect": _tiny_aspect,
    "concreteness": _tiny_concreteness,
    "sensorimotor": _tiny_sensorimotor,
    "wic": _tiny_wic,
}
