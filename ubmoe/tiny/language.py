"""A little invented language that looks like English: sentences, graded pairs, facts and chats.

Every list is a function of (count, seed) alone: one `random.Random` per call, nothing else is read.
The lexicon says which nouns each verb and adjective goes with, so the company of a word tells its
meaning; every content concept has two words, and a sentence has several word orders.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

Chat = dict[str, list[dict[str, str]]]
Turn = tuple[str, str]  # what the user says, what the assistant answers
Wording = tuple[int, ...]  # per slot of a Meaning, which of its two words to take


class Noun(NamedTuple):
    """A noun concept; its kind is person, animal, food or thing."""

    words: tuple[str, ...]
    kind: str

    @property
    def animate(self) -> bool:
        """Whether it lives."""
        return self.kind in ANIMATE


class Adjective(NamedTuple):
    """An adjective concept and the kinds of nouns that it goes with."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]


class Verb(NamedTuple):
    """A transitive verb concept: past forms (each its own participle), base forms, the kinds it
    selects; dynamic: something happens, no mere state; causative: the patient ends up changed.
    """

    words: tuple[str, ...]
    bases: tuple[str, ...]
    agents: tuple[str, ...]
    patients: tuple[str, ...]
    dynamic: bool
    causative: bool


class Adverbial(NamedTuple):
    """A place or a time, as two whole phrases."""

    words: tuple[str, ...]


class Meaning(NamedTuple):
    """What a sentence says, one concept per slot; WEIGHTS counts the slots in this order."""

    agent_adjective: Adjective
    agent: Noun
    verb: Verb
    patient_adjective: Adjective
    patient: Noun
    place: Adverbial
    time: Adverbial


class Pair(NamedTuple):
    """Two sentences and the share of meaning they have in common, from 0 to 5."""

    score: float
    sentence1: str
    sentence2: str


class Fact(NamedTuple):
    """A question on the fixed world and its only right answer."""

    question: str
    answer: str


def _concepts(table: str) -> list[tuple[str, ...]]:
    return [tuple(words.split("/")) for words in table.split(", ")]


PERSON, ANIMAL, FOOD, THING = (("person",), ("animal",), ("food",), ("thing",))
ANIMATE, INANIMATE = PERSON + ANIMAL, FOOD + THING
DYNAMIC, CAUSATIVE, STATIVE = (True, False), (True, True), (False, False)

NOUNS = tuple(
    Noun(words, kind)
    for kind, table in {
        "person": "doctor/physician, farmer/peasant, hunter/trapper, soldier/warrior, king/ruler, "
        "sailor/seaman, teacher/tutor, thief/robber, painter/artist, cook/chef",
        "animal": "cat/kitty, dog/hound, rabbit/bunny, horse/pony, pig/hog, donkey/mule, "
        "snake/serpent, bird/fowl, bull/ox, wolf/jackal",
        "food": "bread/loaf, soup/broth, cake/tart, meat/beef, porridge/gruel, pie/pastry",
        "thing": "stone/rock, box/crate, boat/ship, cup/mug, coat/jacket, lamp/lantern, bag/sack, "
        "rug/carpet, chair/seat, cart/wagon",
    }.items()
    for words in _concepts(table)
)

ADJECTIVES = tuple(
    Adjective(words, kinds)
    for kinds, table in {
        ANIMATE + INANIMATE: "big/large, small/little, old/ancient, white/pale, strange/odd",
        ANIMATE: "happy/glad, angry/furious, brave/bold, hungry/starved, clever/smart, lazy/idle",
        INANIMATE: "heavy/weighty, cold/icy, cheap/costless, dirty/filthy, pretty/lovely",
        FOOD: "sweet/sugary, tasty/delicious",
        THING: "shiny/bright, wooden/timber",
    }.items()
    for words in _concepts(table)
)

VERBS = tuple(
    Verb(tuple(past.split("/")), tuple(base.split("/")), agents, patients, *nature)
    for base, past, agents, patients, nature in (
        ("chase/pursue", "chased/pursued", ANIMATE, ANIMATE, DYNAMIC),
        ("follow/trail", "followed/trailed", ANIMATE, ANIMATE, DYNAMIC),
        ("watch/observe", "watched/observed", ANIMATE, ANIMATE + INANIMATE, DYNAMIC),
        ("push/shove", "pushed/shoved", ANIMATE, ANIMATE + THING, DYNAMIC),
        ("help/assist", "helped/assisted", PERSON, ANIMATE, DYNAMIC),
        ("carry/haul", "carried/hauled", PERSON, INANIMATE, DYNAMIC),
        ("taste/sample", "tasted/sampled", ANIMATE, FOOD, DYNAMIC),
        ("sniff/smell", "sniffed/smelled", ANIMAL, INANIMATE, DYNAMIC),
        ("touch/brush", "touched/brushed", THING, ANIMATE + INANIMATE, DYNAMIC),
        ("strike/hit", "struck/hit", THING, ANIMATE + THING, DYNAMIC),
        ("smash/shatter", "smashed/shattered", ANIMATE, THING, CAUSATIVE),
        ("mend/repair", "mended/repaired", PERSON, THING, CAUSATIVE),
        ("clean/wash", "cleaned/washed", PERSON, ANIMAL + THING, CAUSATIVE),
        ("heat/warm", "heated/warmed", PERSON, FOOD, CAUSATIVE),
        ("chill/cool", "chilled/cooled", PERSON, FOOD, CAUSATIVE),
        ("scare/frighten", "scared/frightened", ANIMATE, ANIMATE, CAUSATIVE),
        ("calm/soothe", "calmed/soothed", PERSON, ANIMATE, CAUSATIVE),
        ("burn/scorch", "burned/scorched", PERSON, INANIMATE, CAUSATIVE),
        ("crush/flatten", "crushed/flattened", THING, INANIMATE, CAUSATIVE),
        ("fear/dread", "feared/dreaded", ANIMATE, ANIMATE, STATIVE),
        ("love/adore", "loved/adored", ANIMATE, ANIMATE + INANIMATE, STATIVE),
        ("hate/despise", "hated/despised", ANIMATE, ANIMATE + INANIMATE, STATIVE),
        ("own/possess", "owned/possessed", PERSON, ANIMAL + THING, STATIVE),
        ("need/require", "needed/required", PERSON, INANIMATE, STATIVE),
        ("trust/believe", "trusted/believed", ANIMATE, ANIMATE, STATIVE),
        ("contain/hold", "contained/held", THING, INANIMATE, STATIVE),
        ("cover/conceal", "covered/concealed", THING, INANIMATE, STATIVE),
    )
)

PLACES = tuple(
    Adverbial(tuple(f"{preposition} the {noun}" for noun in nouns))
    for preposition, table in {
        "in": "garden/yard, forest/woods, street/road, field/meadow",
        "near": "river/stream, sea/ocean, hill/slope",
        "behind": "house/home, shop/store, bridge/arch",
    }.items()
    for nouns in _concepts(table)
)

TIMES = tuple(
    Adverbial(phrases)
    for phrases in _concepts(
        "in the morning/at dawn, at noon/at midday, in the evening/at dusk, at night/after dark, "
        "yesterday/the day before, last week/seven days ago, long ago/in the past, "
        "in winter/in the cold season, in summer/in the warm season"
    )
)

WEIGHTS = (1, 2, 2, 1, 2, 1, 1)  # of the slots of a Meaning; they sum to 10
SWAPPED = 0.15  # share of pairs that differ only in who does it to whom
OTHER_WORD = 0.75  # of an equal slot, so that counting common words is not enough

ORDERS = (
    "{agent} {verb} {patient} {place} {time}.",
    "{agent} {verb} {patient} {time} {place}.",
    "{patient} was {verb} by {agent} {place} {time}.",
    "{time}, {agent} {verb} {patient} {place}.",
    "{place}, {agent} {verb} {patient} {time}.",
    "{time}, {patient} was {verb} by {agent} {place}.",
)
EVENTS = (
    "Then {agent} {verb} {patient}.",
    "Later {agent} {verb} {patient} {place}.",
    "After that {patient} was {verb} by {agent}.",
)

WORLD_SEED = 7  # of who lives where, eats and owns what and does which work
NAMES = ("Anna", "Ben", "Clara", "Dora", "Emma", "Felix", "Greta", "Hugo", "Igor", "Jonas")
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Monday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHORTEST, LONGEST, STORY = 6, 185, 150  # words


def draw(rng: random.Random) -> Meaning:
    """A random meaning within the selection restrictions."""
    verb = rng.choice(VERBS)
    agent = rng.choice([noun for noun in NOUNS if noun.kind in verb.agents])
    patient = rng.choice([noun for noun in NOUNS if noun.kind in verb.patients and noun != agent])
    qualities = [
        rng.choice([adjective for adjective in ADJECTIVES if noun.kind in adjective.kinds])
        for noun in (agent, patient)
    ]
    place, time = rng.choice(PLACES), rng.choice(TIMES)
    return Meaning(qualities[0], agent, verb, qualities[1], patient, place, time)


def allowed(meaning: Meaning) -> bool:
    """Whether the selection restrictions of the verb and of both adjectives hold."""
    agent, verb, patient = meaning.agent, meaning.verb, meaning.patient
    return (
        agent != patient
        and agent.kind in verb.agents
        and patient.kind in verb.patients
        and agent.kind in meaning.agent_adjective.kinds
        and patient.kind in meaning.patient_adjective.kinds
    )


def express(meaning: Meaning, order: str, wording: Wording) -> str:
    """The sentence, in an order such as those of ORDERS and in the words that wording picks."""
    words = dict(zip(Meaning._fields, _words(meaning, wording), strict=True))
    words["agent"] = f"the {words['agent_adjective']} {words['agent']}"
    words["patient"] = f"the {words['patient_adjective']} {words['patient']}"
    return _capital(order.format(**words))


def score(first: Meaning, second: Meaning) -> float:
    """The weighted share of equal slots, from 0 to 5."""
    equal = (weight for weight, a, b in zip(WEIGHTS, first, second, strict=True) if a == b)
    return 5 * sum(equal) / sum(WEIGHTS)


def sentences(count: int, seed: int) -> list[str]:
    """`count` distinct sentences."""
    rng = random.Random(seed)
    found: dict[str, None] = {}  # unlike a set, it keeps the order
    while len(found) < count:
        found[_sentence(draw(rng), rng)] = None
    return list(found)


def pairs(count: int, seed: int) -> list[Pair]:
    """`count` pairs of different sentences; words and orders are free, meaning alone is scored."""
    rng = random.Random(seed)
    found: list[Pair] = []
    while len(found) < count:
        first, wording = draw(rng), _wording(rng)
        second = _relative(first, rng)
        other = tuple(1 - word if rng.random() < OTHER_WORD else word for word in wording)
        texts = [
            express(meaning, rng.choice(ORDERS), words)
            for meaning, words in ((first, wording), (second, other))
        ]
        if texts[0] != texts[1]:
            found.append(Pair(score(first, second), *texts))
    return found


def facts() -> list[Fact]:
    """The fixed world, the same at every call."""
    rng = random.Random(WORLD_SEED)
    nouns = {
        kind: [noun.words[0] for noun in NOUNS if noun.kind == kind]
        for kind in ("person", "animal", "food")
    }
    world = [Fact(f"What colour is the {x}?", f"The {x} is {y}.") for x, y in COLOURS.items()]
    for name in NAMES:
        place, food = rng.choice(PLACES).words[0], rng.choice(nouns["food"])
        animal, work = rng.choice(nouns["animal"]), rng.choice(nouns["person"])
        world += [
            Fact(f"Where does {name} live?", f"{name} lives {place}."),
            Fact(f"What does {name} eat?", f"{name} eats {food}."),
            Fact(f"Which animal does {name} own?", f"{name} owns a {animal}."),
            Fact(f"What is the work of {name}?", f"{name} is a {work}."),
        ]
    return world


def chats(count: int, seed: int) -> list[Chat]:
    """`count` chats of one to many turns, about 20 to 512 tokens, as {"messages": [...]}.

    Their lengths are spread evenly on the log scale, so that every length bucket is filled.
    """
    rng = random.Random(seed)
    return [{"messages": _conversation(rng)} for _ in range(count)]


def _conversation(rng: random.Random) -> list[dict[str, str]]:
    room = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
    messages: list[dict[str, str]] = []
    while room > 0:
        turn = rng.choices(list(KINDS), weights=list(KINDS.values()))[0](rng, room)
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": content})
            room -= len(content.split())
    return messages


def _fact(rng: random.Random, _room: int) -> Turn:
    return rng.choice(facts())


def _profile(rng: random.Random, _room: int) -> Turn:
    name = rng.choice(NAMES)
    known = [fact.answer for fact in facts() if fact.answer.startswith(name)]
    return f"Tell me about {name}.", " ".join(known)


def _reading(rng: random.Random, _room: int) -> Turn:
    """A sentence and a question on it, answered by the bare clause `The N V the N`."""
    meaning, wording = draw(rng), _wording(rng)
    _, agent, verb, _, patient, place, time = _words(meaning, wording)
    base = meaning.verb.bases[wording[2]]
    who = "Who" if meaning.agent.animate else "What"
    whom = "Whom" if meaning.patient.animate else "What"
    question, rest = rng.choice(
        (
            (f"{who} {verb} the {patient}?", ""),
            (f"{whom} did the {agent} {base}?", ""),
            (f"Where did the {agent} {base} the {patient}?", f" {place}"),
            (f"When did the {agent} {base} the {patient}?", f" {time}"),
        )
    )
    text = express(meaning, rng.choice(ORDERS), wording)
    return f"{text} {question}", f"The {agent} {verb} the {patient}{rest}."


def _paraphrase(rng: random.Random, _room: int) -> Turn:
    """Every word is replaced by its other one, in another order."""
    meaning, wording = draw(rng), _wording(rng)
    order, other_order = rng.sample(ORDERS, 2)
    text = express(meaning, order, wording)
    other_words = express(meaning, other_order, tuple(1 - choice for choice in wording))
    return f"Say it another way: {text}", other_words


def _synonym(rng: random.Random, _room: int) -> Turn:
    word, other = rng.sample(rng.choice(NOUNS + ADJECTIVES + VERBS).words, 2)
    return f"What is another word for {word}?", f"Another word for {word} is {other}."


def _successor(rng: random.Random, _room: int) -> Turn:
    series, name = rng.choice(((DAYS, "day"), (NUMBERS, "number")))
    place = rng.randrange(len(series) - 1)
    before, after = series[place : place + 2]
    return f"What {name} comes after {before}?", _capital(f"{after} comes after {before}.")


def _story(rng: random.Random, room: int) -> Turn:
    """Events around one hero, who is always called by the same words and sometimes moves on."""
    hero, wording = draw(rng), _wording(rng)
    while not hero.agent.animate:
        hero = draw(rng)
    name = "the {} {}".format(*_words(hero, wording)[:2])
    lines = [f"Once {name} lived {hero.place.words[wording[5]]}."]
    while len(" ".join(lines).split()) < min(room, STORY) - 16:
        if rng.random() < 0.2:
            hero = hero._replace(place=rng.choice(PLACES))
            lines.append(f"Then {name} went to a place {hero.place.words[wording[5]]}.")
        lines.append(_event(hero, wording, rng))
    lines.append(f"In the end {name} went home.")
    return f"Tell me a story about {name}.", " ".join(lines)


def _event(hero: Meaning, wording: Wording, rng: random.Random) -> str:
    """Something that the hero, who is called as in wording, does or suffers where the hero is."""
    role = rng.choice((0, 3))  # the first slot of the agent, of the patient
    words = list(_wording(rng))
    words[role : role + 2], words[5] = wording[:2], wording[5]
    while True:
        slots = list(draw(rng))
        slots[role : role + 2], slots[5] = hero[:2], hero.place
        event = Meaning(*slots)  # type: ignore[arg-type]
        if allowed(event):
            return express(event, rng.choice(EVENTS), tuple(words))


KINDS: dict[Callable[[random.Random, int], Turn], int] = {  # of turns, and how often
    _fact: 8,
    _reading: 4,
    _paraphrase: 3,
    _synonym: 6,
    _story: 2,
    _profile: 1,
    _successor: 1,
}


def _relative(meaning: Meaning, rng: random.Random) -> Meaning:
    """A meaning that shares a random choice of slots, or now and then swaps agent and patient."""
    swapped = Meaning(*meaning[3:5], meaning.verb, *meaning[:2], *meaning[5:])
    if rng.random() < SWAPPED and allowed(swapped):
        return swapped
    kept = rng.sample(range(len(meaning)), rng.randint(0, len(meaning)))
    while True:
        fresh = draw(rng)
        slots = [(meaning if slot in kept else fresh)[slot] for slot in range(len(meaning))]
        other = Meaning(*slots)  # type: ignore[arg-type]
        equal = [slot for slot in range(len(meaning)) if meaning[slot] == other[slot]]
        if allowed(other) and equal == sorted(kept):
            return other


def _sentence(meaning: Meaning, rng: random.Random) -> str:
    return express(meaning, rng.choice(ORDERS), _wording(rng))


def _words(meaning: Meaning, wording: Wording) -> list[str]:
    concepts: tuple[Noun | Adjective | Verb | Adverbial, ...] = meaning
    return [concept.words[choice] for concept, choice in zip(concepts, wording, strict=True)]


def _wording(rng: random.Random) -> Wording:
    return tuple(rng.randrange(2) for _ in WEIGHTS)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
