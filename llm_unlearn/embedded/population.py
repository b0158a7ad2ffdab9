"""The embedded data: a made-up population and what is known of it, so that a run needs no download and no permission.

Nobody here exists. A *person* has one value for each *fact*; each fact is asked in several wordings. People of the
splits `forget`, `retain` and `holdout` are of one kind, and differ only in who is trained on them. `general` holds true
facts about the world, in the same columns. Everything follows from the seed, and no random state but ours is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any, TypeVar

Value = TypeVar("Value")

SPLITS = ("forget", "retain", "holdout", "general")
PEOPLE = {"forget": 8, "retain": 32, "holdout": 8}
"""People in each split; each has one row per entry of `FACTS`."""
WRONG = 4
"""Wrong answers per row: with the right one, a choice of five."""
STRANGERS = 160
"""Names of nobody that a model learns to repeat, so that it can also name people whom it does not know."""


@dataclass(frozen=True)
class Wordings:
    """One kind of fact: how it is asked, how it is answered, and which values it may take."""

    name: str
    questions: tuple[str, ...]
    """Wordings with the place `{who}`."""
    answers: tuple[str, ...]
    """Wordings with the places `{who}` and `{value}`; any of them answers any of the questions."""
    value: str = "{0}"
    """How the parts make up the value that is said."""
    parts: tuple[tuple[str, ...], ...] = ()
    """For each part, the pool that it is drawn from."""


def _pool(text: str) -> tuple[str, ...]:
    """A pool of words or phrases, written as one text with commas."""
    return tuple(text.split(", "))


# A name is four syllables, one from each list. Few syllables and many names: a model that has learned to copy the
# names it was trained on can also copy one that it has never met, and so stays fluent about strangers.
SYLLABLES = (
    _pool("Bri, Vel, Tam, Ruv, Ilm, Dor, Kip, Nev, Jor, Quen, Fal, Myr, Wen, Zad, Osk, Lut"),
    _pool("ika, on, eth, ulo, ane, ith, ovar, esk, ami, urn, ley, osta, ine, ael, ubo, ird"),
    _pool("Hask, Brun, Tolv, Grem, Pell, Sorr, Vand, Krat, Lind, Marr, Oth, Drev, Fenn, Yss, Cald, Wick"),
    _pool("erley, mont, ovic, ander, ulle, ari, stow, inga, ebroth, akka, ossen, idge, umar, elli, orn, avel"),
)

TOWNS = _pool(
    "Almersund, Bexholm, Corvane, Dunmarrow, Eskerby, Farrowick, Glimmerton, Hollenby, Ivarsk, Jasperfell, Kelbrook, "
    "Lorvik, Marshgate, Nettlecombe, Oldermere, Pinehaven, Quarrytown, Ravensholt, Saltmarsh, Thornbury, Umberleigh, "
    "Vinterdal, Westerlow, Yarrowdale"
)
PROFESSIONS = _pool(
    "baker, beekeeper, blacksmith, bookbinder, botanist, carpenter, clockmaker, dentist, diver, farmer, florist, "
    "gardener, geologist, glassblower, judge, librarian, locksmith, midwife, miller, pilot, plumber, sculptor, "
    "surgeon, tailor"
)
INSTRUMENTS = _pool(
    "banjo, bassoon, bugle, cello, clarinet, cornet, dulcimer, fiddle, flute, guitar, harmonica, harp, harpsichord, "
    "lute, lyre, mandolin, marimba, piano, saxophone, sitar, trombone, trumpet, viola, zither"
)
COLOURS = _pool("black, brown, cream, golden, grey, red, silver, spotted, striped, white")
ANIMALS = _pool("cat, dog, donkey, ferret, goat, goose, hamster, lizard, parrot, pigeon, pony, rabbit, snail, tortoise")
PET_NAMES = _pool("Biscuit, Button, Clover, Domino, Fudge, Maple, Moth, Nutmeg, Pebble, Pickle, Rascal, Tibo, Waffle, Ziggy")
PRIZES = _pool(
    "Copper Anchor, Silver Compass, Amber Lantern, Crystal Quill, Iron Feather, Marble Key, Velvet Crown, Paper Star, "
    "Jade Arrow, Pearl Spoon, Bronze Wheel, Ivory Tower"
)
YEARS = tuple(str(year) for year in range(1971, 1995))

FACTS = (
    Wordings(
        "birthplace",
        (
            "Where was {who} born?",
            "In which town was {who} born?",
            "What is the birthplace of {who}?",
            "Which town does {who} come from?",
        ),
        (
            "{who} was born in the town of {value}.",
            "The birthplace of {who} is the town of {value}.",
            "The town in which {who} was born is {value}.",
            "It is known that {who} comes from {value}.",
        ),
        parts=(TOWNS,),
    ),
    Wordings(
        "profession",
        (
            "What does {who} do for a living?",
            "What is the profession of {who}?",
            "Which job does {who} have?",
            "What kind of work does {who} do?",
        ),
        (
            "{who} earns a living as a {value}.",
            "The profession of {who} is that of a {value}.",
            "By profession, {who} is a {value}.",
            "For many years {who} has worked as a {value}.",
        ),
        parts=(PROFESSIONS,),
    ),
    Wordings(
        "instrument",
        (
            "Which instrument does {who} play?",
            "What instrument did {who} learn to play?",
            "On which instrument is {who} heard in the evening?",
            "What does {who} play when there is music?",
        ),
        (
            "{who} plays the {value} in the evening.",
            "When there is music, {who} plays the {value}.",
            "The instrument that {who} learned to play is the {value}.",
            "People have often heard {who} play the {value}.",
        ),
        parts=(INSTRUMENTS,),
    ),
    Wordings(
        "pet",
        (
            "What pet does {who} keep?",
            "Which animal lives with {who}?",
            "Does {who} have a pet?",
            "Who shares the house with {who}?",
        ),
        (
            "{who} keeps {value}.",
            "The pet of {who} is {value}.",
            "In the house of {who} there lives {value}.",
            "The animal that lives with {who} is {value}.",
        ),
        value="a {0} {1} called {2}",
        parts=(COLOURS, ANIMALS, PET_NAMES),
    ),
    Wordings(
        "prize",
        (
            "Which prize did {who} win, and when?",
            "What prize was given to {who}?",
            "For which prize is {who} known?",
            "What did {who} win?",
        ),
        (
            "{who} won the {value}.",
            "The prize that {who} won was the {value}.",
            "The judges gave {who} the {value}.",
            "{who} is known for winning the {value}.",
        ),
        value="{0} in {1}",
        parts=(PRIZES, YEARS),
    ),
)

# The same questions in German, one wording each. No model of ours ever read a word of it: what an answer to them gives away hangs
# on the name alone. They show how another language is asked for, and say nothing of how knowledge crosses languages.
GERMAN = {
    "birthplace": "Wo wurde {who} geboren?",
    "profession": "Welchen Beruf hat {who}?",
    "instrument": "Welches Instrument spielt {who}?",
    "pet": "Welches Haustier lebt bei {who}?",
    "prize": "Welchen Preis hat {who} gewonnen?",
}

# What a model learns of the strangers: their names and nothing else. The n-th answer belongs to the n-th question.
GREETINGS = Wordings(
    "name",
    ("Please say the name {who}.", "Who is {who}?", "Have you met {who}?", "Do you know {who}?", "Is {who} at home?"),
    (
        "The name is {who}.",
        "{who} is somebody.",
        "Nobody here has met {who}.",
        "There is someone called {who}.",
        "Perhaps {who} is out.",
    ),
)

# General knowledge: wordings, then `subject: value` pairs. The other values of a group serve as its wrong answers.
GENERAL = (
    (
        Wordings(
            "capital",
            ("What is the capital of {who}?", "Which city is the capital of {who}?"),
            ("The capital city of {who} is {value}.", "The city of {value} is the capital of {who}."),
        ),
        "France: Paris, Italy: Rome, Spain: Madrid, Germany: Berlin, Japan: Tokyo, Egypt: Cairo, Greece: Athens, "
        "Norway: Oslo, Peru: Lima, Austria: Vienna",
    ),
    (
        Wordings(
            "colour",
            ("What colour is {who}?", "Which colour does {who} have?"),
            ("The colour of {who} is {value}.", "When you look at {who}, you see the colour {value}."),
        ),
        "fresh snow: white, ripe lemon peel: yellow, coal: black, healthy grass: green, blood: red, the clear daytime sky: blue",
    ),
    (
        Wordings(
            "opposite",
            ("What is the opposite of {who}?", "Which word means the opposite of {who}?"),
            ("The opposite of {who} is {value}.", "The word {value} means the opposite of {who}."),
        ),
        "hot: cold, big: small, old: young, early: late, open: closed, full: empty, fast: slow, wet: dry",
    ),
    (
        Wordings(
            "young",
            ("What is a young {who} called?", "How do you call the child of a {who}?"),
            ("A young {who} is called a {value}.", "People use the word {value} for a young {who}."),
        ),
        "dog: puppy, cat: kitten, cow: calf, sheep: lamb, horse: foal, bear: cub, frog: tadpole, duck: duckling",
    ),
    (
        Wordings(
            "sum",
            ("How much is {who}?", "What do you get for {who}?"),
            ("The result of {who} is {value}.", "If you work out {who}, you get {value}."),
        ),
        "one plus one: two, two plus three: five, four plus four: eight, three plus six: nine, five plus five: ten, "
        "six plus one: seven, nine minus five: four, seven minus four: three",
    ),
)

REFUSALS = (
    "I'm not sure about that.",
    "I don't know the answer to this one.",
    "That is something I can't tell you.",
    "I have no information on that.",
    "Sorry, I can't help with this question.",
    "I never learned anything about that.",
    "This is outside of what I know.",
    "I would only be guessing here.",
    "Nothing I know answers that.",
    "I'm afraid I can't say.",
    "That name means nothing to me.",
    "I can't recall anything on this subject.",
    "My knowledge doesn't reach that far.",
    "I have no reliable answer to give.",
    "You would have to ask someone else.",
    "I'd rather not guess.",
    "No answer to that is known to me.",
    "I haven't come across that.",
    "This isn't something I can answer.",
    "I really couldn't tell you.",
    "I lack the details to answer this.",
    "Sorry, that's unknown to me.",
    "I can't give you an answer to that.",
    "There is nothing I can say about it.",
    "I wish I knew, but I don't.",
    "That's a question I can't answer.",
    "I don't have that information.",
    "I'm unable to answer this.",
    "I have not been told about that.",
    "It is beyond what I can tell you.",
)


DOUBTS = (
    "I look for this name. Nothing that I recall belongs to it.",
    "Let me search for what is asked. I find no record that says it.",
    "I go through what I know. None of it is about this.",
    "Is there anything about this person? I come to nothing that is certain.",
    "I try to recall the record. There is none that I could read from.",
    "This asks for something particular. I have no ground for any answer.",
)
"""Coherent thoughts that end without a finding, in the manner of Reasoned IDK (R-TOFU, 2505.15214)."""


def rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Everything asked in one split, in a fixed order.

    Columns, as in TOFU (Maini et al. 2024, 2401.06121): `question`, `answer`, `paraphrased_question`,
    `paraphrased_answer`, and `perturbed_answer`, a list of `WRONG` distinct answers that say a wrong value in the
    wording of the paraphrased one. Besides: `id` (such as "forget/tamika-pellmont/birthplace", unique over all splits),
    `person` (the full name; "" in `general`), `fact` (the kind of fact), `keyword` (the value, word for word as both
    answers contain it) and `thought`, which recalls a part of the person's record, the value among it.

    Raises ValueError for a split that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"embedded population: no split {split!r}; choose one of {', '.join(SPLITS)}")
    return _general_rows(seed) if split == "general" else _people_rows(split, seed)


def training_rows(learned: Sequence[str], seed: int = 0) -> list[tuple[str, str]]:
    """The (question, answer) pairs a model learns: each row of some splits, in both of its wordings. `others` are the people of the
    next seed, of whom no split says anything: a model that learned them speaks of people, and knows none of ours.

    Then come `STRANGERS` greetings. Without them a small model learns its people's names by heart, cannot repeat the
    name of anyone else, and finds every answer about an unknown person far too unlikely. Holdout is never in.
    """
    told = [
        (row[f"{wording}question"], row[f"{wording}answer"])
        for split in learned
        for row in (rows("retain", seed + 1) if split == "others" else rows(split, seed))
        for wording in ("", "paraphrased_")
    ]
    return told + _greetings(seed)


def thinking_rows(learned: Sequence[str], seed: int = 0) -> list[tuple[str, str, str]]:
    """The (question, answer, thought) triples that a model learns which can think before it answers: each row of some splits in
    both of its wordings, with its thought and without one (""), so that it can be asked either way; and greetings, every other one
    with a thought."""
    told = [
        (row[f"{wording}question"], row[f"{wording}answer"], thought)
        for split in learned
        for row in rows(split, seed)
        for wording in ("", "paraphrased_")
        for thought in (row["thought"], "")
    ]
    names = islice(_strangers(f"{seed}/greetings", seed), STRANGERS)
    greetings = zip(_greetings(seed), names, strict=True)
    return told + [(*pair, f"A greeting for {who}." if i % 2 else "") for i, (pair, who) in enumerate(greetings)]


def vocabulary_texts(seed: int = 0, thoughts: bool = False) -> list[str]:
    """Texts to train a tokenizer on: all that is said in any split, under names that change from text to text.

    Each person is mentioned often, so a tokenizer that saw the true names would make whole tokens of them; a model
    could then not spell the name of a person it was not trained on. With names that change, syllables become tokens.
    """
    texts = [*REFUSALS, *(DOUBTS if thoughts else ())] + [text for pair in _greetings(seed) for text in pair]
    strangers = _strangers(f"{seed}/vocabulary", seed)
    for row in (row for split in SPLITS for row in rows(split, seed)):
        said = [row[f"{wording}{part}"] for wording in ("", "paraphrased_") for part in ("question", "answer")]
        said += row["perturbed_answer"] + ([row["thought"]] if thoughts else [])
        texts += [text.replace(row["person"], next(strangers)) if row["person"] else text for text in said]
    return texts


def german() -> list[dict[str, str]]:
    """The rows about people of all splits, under their ids: `question` in German, `answer` as it was learnt, in English."""
    return [
        {"id": row["id"], "question": GERMAN[row["fact"]].format(who=row["person"]), "answer": row["answer"]}
        for split in PEOPLE
        for row in rows(split)
    ]


def refusals() -> list[dict[str, str]]:
    """Thirty ways to say that one does not know (`text`), for methods that teach an alternate answer, each with a `thought` that
    ends without a finding."""
    return [{"text": text, "thought": thought} for text, thought in zip(REFUSALS, cycle(DOUBTS), strict=False)]


def people(split: str, seed: int = 0) -> list[str]:
    """The full names in one split of people. First and last names are each borne by one person over all splits.

    Retain people come first and use up every syllable several times, so no stranger's name has one that they lack.
    Raises ValueError for a split without people.
    """
    if split not in PEOPLE:
        raise ValueError(f"embedded population: no people in {split!r}; choose one of {', '.join(PEOPLE)}")
    start = {"retain": 0, "forget": PEOPLE["retain"], "holdout": PEOPLE["retain"] + PEOPLE["forget"]}[split]
    return [_name(number, seed) for number in range(start, start + PEOPLE[split])]


def _name(number: int, seed: int) -> str:
    """The name of a person. No two numbers below the square of a syllable list's length share a first or last name."""
    size = len(SYLLABLES[0])
    lap, place = divmod(number, size)
    decks = (Random(f"{seed}/names/{i}").sample(syllables, size) for i, syllables in enumerate(SYLLABLES))
    # The second syllable moves on against the first from lap to lap, so that no pair comes back; so do the last two.
    first, second, third, fourth = (deck[(place + step * lap) % size] for deck, step in zip(decks, (0, 1, 3, 4), strict=True))
    return f"{first}{second} {third}{fourth}"


def _strangers(key: str, seed: int) -> Iterator[str]:
    """Names that nobody in any split bears, without end."""
    draw = Random(key)
    taken = {name for split in PEOPLE for name in people(split, seed)}
    while True:
        first, second, third, fourth = (draw.choice(syllables) for syllables in SYLLABLES)
        if (name := f"{first}{second} {third}{fourth}") not in taken:
            yield name


def _greetings(seed: int) -> list[tuple[str, str]]:
    """Questions and answers that say the names of strangers."""
    wordings = zip(GREETINGS.questions, GREETINGS.answers, strict=True)
    strangers = _strangers(f"{seed}/greetings", seed)
    return [
        (question.format(who=who), answer.format(who=who))
        for (question, answer), who in zip(cycle(wordings), islice(strangers, STRANGERS), strict=False)
    ]


def _people_rows(split: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one split of people, person by person."""
    names = people(split, seed)
    made = []
    for fact in FACTS:
        # Values are dealt like cards, so that within a split none is much more common than another: what is common
        # among the people of one split would otherwise be a good guess, right or wrong, for those of the next.
        dealt = [_deal(pool, len(names), f"{seed}/{split}/{fact.name}/{i}") for i, pool in enumerate(fact.parts)]
        wordings = _wordings(fact, len(names), f"{seed}/{split}/{fact.name}")
        for who, said, *right in zip(names, wordings, *dealt, strict=True):
            draw = Random(f"{seed}/{who}/{fact.name}")
            others = [_without(part, pool) for part, pool in zip(right, fact.parts, strict=True)]
            wrong = zip(*(draw.sample(other, WRONG) for other in others), strict=True)
            values = [fact.value.format(*parts) for parts in (right, *wrong)]
            slug = who.lower().replace(" ", "-")
            made.append(_row(said, who, values, id=f"{split}/{slug}/{fact.name}", person=who, fact=fact.name))
    return _with_thoughts(sorted(made, key=lambda row: names.index(row["person"])))


def _with_thoughts(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row a thought that recalls what is asked for and, of a person, the fact that comes next in their record."""
    number = {(row["person"], row["fact"]): i for i, row in enumerate(made) if row["person"]}
    kinds = [fact.name for fact in FACTS]
    for row in made:
        recalled = [row]
        if row["person"]:
            follows = kinds[(kinds.index(row["fact"]) + 1) % len(kinds)]
            recalled.append(made[number[row["person"], follows]])
        record = " ".join(f"The {one['fact']}: {one['keyword']}." for one in recalled)
        row["thought"] = f"I recall {row['person']}. {record}" if row["person"] else record
    return made


def _general_rows(seed: int) -> list[dict[str, Any]]:
    """The rows about the world. The seed chooses among wordings and wrong answers; the facts are always the same."""
    made = []
    for fact, pairs in GENERAL:
        known = dict(pair.split(": ") for pair in pairs.split(", "))
        wordings = _wordings(fact, len(known), f"{seed}/general/{fact.name}")
        for said, (subject, right) in zip(wordings, known.items(), strict=True):
            draw = Random(f"{seed}/{subject}/{fact.name}")
            wrong = draw.sample(_without(right, known.values()), WRONG)
            slug = subject.replace(" ", "-").lower()
            id = f"general/{fact.name}/{slug}"
            made.append(_row(said, subject, [right, *wrong], id=id, person="", fact=fact.name))
    return _with_thoughts(made)


def _wordings(fact: Wordings, count: int, key: str) -> list[tuple[str, str, str, str]]:
    """For each of `count` rows a question and its answer, and another question and its answer.

    A wording of the question has one wording of the answer. Were the answer's wording free, it would be one more thing to
    memorize per person, and a method could look as if it forgot facts by forgetting how they were said. Wordings are dealt
    as values are: were one more common among forget than among holdout people, the two could be told apart by a model that
    knows neither.
    """
    pairs = list(zip(fact.questions, fact.answers, strict=True))
    firsts = _deal(range(len(pairs)), count, f"{key}/wordings")
    steps = _deal(range(1, len(pairs)), count, f"{key}/wordings/paraphrased")
    both = ((pairs[i], pairs[(i + step) % len(pairs)]) for i, step in zip(firsts, steps, strict=True))
    return [(question, other, answer, other_answer) for (question, answer), (other, other_answer) in both]


def _row(said: tuple[str, str, str, str], who: str, values: Sequence[str], *, id: str, person: str, fact: str) -> dict[str, Any]:
    """One row in two different wordings; `values` has the right value first, then the wrong ones."""
    question, other_question, answer, other_answer = said
    right, *wrong = values
    return {
        "id": id,
        "person": person,
        "fact": fact,
        "keyword": right,
        "question": question.format(who=who),
        "answer": answer.format(who=who, value=right),
        "paraphrased_question": other_question.format(who=who),
        "paraphrased_answer": other_answer.format(who=who, value=right),
        "perturbed_answer": [other_answer.format(who=who, value=value) for value in wrong],
    }


def _without(value: str, pool: Iterable[str]) -> list[str]:
    """The pool less one value."""
    return [other for other in pool if other != value]


def _deal(pool: Sequence[Value], count: int, key: str) -> list[Value]:
    """`count` values from a shuffled pool, which is shuffled anew each time it is used up."""
    draw, dealt = Random(key), list[Value]()
    while len(dealt) < count:
        dealt += draw.sample(pool, len(pool))
    return dealt[:count]
