"""The made-up population: complete rows, wrong answers that are wrong, and splits that do not leak into one another."""

import random

import pytest

from llm_unlearn.embedded import population
from llm_unlearn.embedded.target import LEARNED

PEOPLE_SPLITS = ("forget", "retain", "holdout")
COLUMNS = {
    "id",
    "person",
    "fact",
    "keyword",
    "question",
    "answer",
    "paraphrased_question",
    "paraphrased_answer",
    "thought",
    "perturbed_answer",
}


@pytest.mark.parametrize("split", population.SPLITS)
def test_rows_are_complete(split):
    rows = population.rows(split)
    assert len(rows) >= 40
    for row in rows:
        assert set(row) == COLUMNS
        assert row["question"] != row["paraphrased_question"]
        assert row["answer"] != row["paraphrased_answer"]
        for column in ("question", "answer", "paraphrased_question", "paraphrased_answer"):
            assert "{" not in row[column]
            assert row["person"] in row[column]
        assert row["keyword"] in row["answer"] and row["keyword"] in row["paraphrased_answer"]


@pytest.mark.parametrize("split", population.SPLITS)
def test_wrong_answers_are_wrong_and_differ_only_in_the_value(split):
    for row in population.rows(split):
        wrong = row["perturbed_answer"]
        assert 3 <= len(wrong) <= 5
        assert len({row["paraphrased_answer"], *wrong}) == len(wrong) + 1
        before, after = row["paraphrased_answer"].split(row["keyword"])
        assert all(answer.startswith(before) and answer.endswith(after) for answer in wrong)


def test_no_name_is_shared():
    people = [name for split in PEOPLE_SPLITS for name in population.people(split)]
    assert len(people) == sum(population.PEOPLE.values())
    words = [word for name in people for word in name.split()]
    assert len(set(words)) == len(words)


def test_ids_are_unique():
    ids = [row["id"] for split in population.SPLITS for row in population.rows(split)]
    assert len(set(ids)) == len(ids)
    assert all(id == id.lower() and " " not in id for id in ids)


def test_strangers_are_spelled_with_syllables_that_retain_people_have():
    """Else the retrained model could not be fluent about people it never met."""
    retain = " ".join(population.people("retain"))
    for split in ("forget", "holdout"):
        for syllables in population.SYLLABLES:
            used = [part for part in syllables if part in " ".join(population.people(split))]
            assert all(part in retain for part in used)


def test_the_seed_decides_and_nothing_else():
    state = random.getstate()
    for split in population.SPLITS:
        assert population.rows(split, seed=3) == population.rows(split, seed=3)
        assert population.rows(split, seed=3) != population.rows(split, seed=4)
    assert random.getstate() == state


def test_training_rows():
    def both_wordings(split):
        for row in population.rows(split):
            yield row["question"], row["answer"]
            yield row["paraphrased_question"], row["paraphrased_answer"]

    taught = {name: set(population.training_rows(splits)) for name, splits in LEARNED.items()}
    target, retrained, base = taught["target"], taught["retrained"], taught["base"]
    forget, retain, holdout, general = (set(both_wordings(split)) for split in population.SPLITS)
    greetings = target - forget - retain - general
    assert forget | retain | general <= target
    assert retrained == target - forget
    assert not target & holdout
    assert len(greetings) == population.STRANGERS
    people = [name for split in PEOPLE_SPLITS for name in population.people(split)]
    assert not any(name in text for name in people for pair in greetings for text in pair)
    assert general < base and len(base) > 2 * len(general), "it learned to speak of people"
    assert not any(name in text for name in people for pair in base for text in pair), "and of none of ours"


def test_vocabulary_texts_do_not_name_the_people():
    texts = "\n".join(population.vocabulary_texts())
    assert not any(row["person"] in texts for split in PEOPLE_SPLITS for row in population.rows(split))
    characters = {character for split in population.SPLITS for row in population.rows(split) for character in str(row)}
    assert {character for character in characters if character.isalpha()} <= set(texts)


def test_refusals():
    assert len({row["text"] for row in population.refusals()}) == 30 and all(row["thought"] for row in population.refusals())


@pytest.mark.parametrize("split", PEOPLE_SPLITS)
def test_wordings_are_as_common_in_each_split(split):
    """Else a model that knows neither forget nor holdout could tell them apart by the wording."""
    rows = population.rows(split)
    for fact in population.FACTS:
        answers = [row["answer"].replace(row["person"], "{who}") for row in rows if row["fact"] == fact.name]
        starts = {wording.split("{value}")[0] for wording in fact.answers}
        counts = {start: sum(answer.startswith(start) for answer in answers) for start in starts}
        assert set(counts.values()) == {len(answers) // len(starts)}


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'train'.*forget, retain, holdout, general"):
        population.rows("train")


def test_the_german_questions_name_the_same_people_under_the_same_ids():
    theirs = {row["id"]: row for split in PEOPLE_SPLITS for row in population.rows(split)}
    german = {row["id"]: row for row in population.german()}
    assert german.keys() == theirs.keys()
    for id, row in german.items():
        assert theirs[id]["person"] in row["question"] and "{" not in row["question"]
        assert row["answer"] == theirs[id]["answer"] and row["question"] not in theirs[id].values()
    assert len({row["question"] for row in german.values()}) == len(german)
