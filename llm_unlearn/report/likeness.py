"""What may stand beside each other in one comparison: which keys of two evaluations differ, and what of them can still be shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_unlearn.report.verdict import Number, Results, printable, settings_text
from llm_unlearn.spec import Refused, dotted

MOST = 12
"""So many differing keys are said; the rest is counted."""


@dataclass(frozen=True)
class Run:
    """One model that was evaluated: the name it is shown by, where it was found, and what was found."""

    name: str
    folder: str
    results: Results
    """What its `evaluation.json` holds."""
    log: Sequence[Mapping[str, Any]] = ()
    """The rows of its `log.jsonl`, where it is a run folder."""


def key_of(number: Number) -> tuple[str, str, str]:
    """What makes two numbers the same measure: its name, its set, its settings."""
    return str(number["measure"]), str(number["set"]), json.dumps(number["settings"], sort_keys=True)


def comparable(runs: Sequence[Run], common: bool = False) -> tuple[list[Run], list[str]]:
    """The runs as they may be compared, and what a reader must be told.

    Args:
        common: where the suites differ, go on with the measures that all runs have alike, instead of refusing.

    Raises:
        Refused: the suites or the rows are not the same: with the keys that differ, and what could be shown with `--common`.
    """
    first, notes = runs[0], []
    others = [run for run in runs if run.results["suite_hash"] != first.results["suite_hash"]]
    if others:
        found, shared = [differing(first, run) for run in others], shared_keys(runs)
        lines = [
            f"{run.folder}: was measured by another suite than {first.folder}: {_few(keys)}."
            for run, keys in zip(others, found, strict=True)
        ]
        if not shared:
            raise Refused("\n".join([*lines, f"No measure is the same in all runs. {_again(first)}"]))
        names = _by_set([number for number in first.results["numbers"] if key_of(number) in shared])
        if not common:
            raise Refused("\n".join([*lines, f"Add --common to compare what is the same in all: {names}. Or: {_again(first)}"]))
        notes.append(f"The runs were measured by different suites; only what is the same in all is shown: {names}.")
        runs = [replace(run, results=_only(run.results, shared)) for run in runs]
    return list(runs), [*notes, *_other_rows(runs)]


def _again(first: Run) -> str:
    return f"evaluate all by one suite: llm-unlearn evaluate {first.results['suite']} --model RUN --model RUN … --output FOLDER"


def _by_set(numbers: Sequence[Number]) -> str:
    """`on forget perplexity, rouge; on retain rouge`."""
    sets = dict.fromkeys(str(number["set"]) for number in numbers)
    return "; ".join(f"on {name} " + ", ".join(str(one["title"]) for one in numbers if one["set"] == name) for name in sets)


def _few(keys: Sequence[str]) -> str:
    more = f"; {len(keys) - MOST} more" if len(keys) > MOST else ""
    return "; ".join(keys[:MOST]) + more if keys else "its settings are not in the file"


def differing(one: Run, other: Run) -> list[str]:
    """The keys in which two suites differ, each with both values; of files without the suite's settings, the measures."""
    first, second = (run.results.get("suite_settings") for run in (one, other))
    if first and second:
        left, right = (dict(_leaves(suite)) for suite in (first, second))
        keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
        return [f"{key}: {_word(right.get(key))}, not {_word(left.get(key))}" for key in keys]
    mine, theirs = ({key_of(number): number for number in run.results["numbers"]} for run in (one, other))
    only = [f"{number['title']} on {number['set']} {_settings(number)}is only in {one.folder}" for key, number in mine.items()
            if key not in theirs]  # fmt: skip
    only += [f"{number['title']} on {number['set']} {_settings(number)}is only in {other.folder}" for key, number in theirs.items()
             if key not in mine]  # fmt: skip
    names = [str(run.results["suite"]) for run in (one, other)]
    return ([f"suite: {names[1]}, not {names[0]}"] if names[0] != names[1] else []) + only


def _settings(number: Number) -> str:
    found = settings_text(number["settings"])
    return f"({found}) " if found else ""


def _word(value: object) -> str:
    return "nothing" if value is None else printable(json.dumps(value, ensure_ascii=False), 60)


def _leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterable[tuple[str, object]]:
    """Every value of a nested tree by its dotted path; a measure stands under its name and set, not under its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, (list, tuple)) and all(isinstance(one, Mapping) and "name" in one for one in value):
        count: dict[str, int] = {}
        for one in value:
            name = " ".join(_named(one[key]) for key in ("name", "attack", "set") if one.get(key))
            count[name] = count.get(name, 0) + 1
            yield from _leaves(one, (*path, name if count[name] == 1 else f"{name} ({count[name]})"))
    else:
        yield dotted(path), value


def _named(value: object) -> str:
    return str(value["name"] if isinstance(value, Mapping) else value)


def shared_keys(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """The measures that are the same in all runs: by name, set and settings, on the same rows, and asked in the same way."""
    # forget quality and the reference attack are made with the retrained model, whose identity `comparison` looks at
    alike = [{key_of(number) for number in run.results["numbers"]} for run in runs]
    keys = [key_of(number) for number in runs[0].results["numbers"] if all(key_of(number) in found for found in alike)]
    return [key for key in keys if all(_same_set(runs[0], run, key) for run in runs[1:])]


def _same_set(one: Run, other: Run, key: tuple[str, str, str]) -> bool:
    name, of, settings = key
    sets = [of, *([against] if (against := json.loads(settings).get("against")) else [])]
    first, second = suites = [run.results.get("suite_settings") for run in (one, other)]
    for each in sets:
        if _rows(one, each) != _rows(other, each):
            return False
        if first and second and first["sets"].get(each) != second["sets"].get(each):
            return False
    lengths = [suite and suite.get("max_new_tokens") for suite in suites]  # a file that does not say it may have any
    return name not in ("rouge", "exact_match") or (lengths[0] is not None and lengths[0] == lengths[1])


def _rows(run: Run, name: str) -> list[tuple[str, str, str]]:
    return [(str(row["id"]), str(row["prompt"]), str(row["truth"])) for row in run.results["answers"].get(name, ())]


def _only(results: Results, keys: Sequence[tuple[str, str, str]]) -> Results:
    """An evaluation with the measures of these keys only, and with what else rests on their sets."""
    against = {json.loads(settings).get("against") for _, _, settings in keys}
    sets = {of for _, of, _ in keys} | against
    sampled = {of for name, of, _ in keys if name == "discoverable_extraction"}
    return {
        **results,
        "numbers": [number for number in results["numbers"] if key_of(number) in keys],
        "curves": {name: curve for name, curve in results["curves"].items() if curve["set"] in sampled},
        "answers": {name: rows for name, rows in results["answers"].items() if name in sets},
    }


def _other_rows(runs: Sequence[Run]) -> list[str]:
    """Where a run has fewer rows than the first (another tokenizer cuts elsewhere).

    Raises:
        Refused: the same row has another question or answer: the data changed between the evaluations.
    """
    notes = []
    problems = []
    for name in dict.fromkeys(name for run in runs for name in run.results["answers"]):
        known = {row: rest for row, *rest in _rows(runs[0], name)}
        for run in runs[1:]:
            found = {row: rest for row, *rest in _rows(run, name)}
            changed = [row for row in found if row in known and found[row] != known[row]]
            if changed:
                problems.append(
                    f"{run.folder}: sets.{name}: {len(changed)} of {len(found)} rows are others than in {runs[0].folder}, such as "
                    f"{printable(changed[0], 60)!r}: the data changed between the two evaluations. Evaluate both again."
                )
            elif found.keys() != known.keys():
                notes.append(f"{run.name} was asked {len(found)} rows of {name}, {runs[0].name} {len(known)}.")
    if problems:
        raise Refused("\n".join(problems))
    if len(notes) > MOST:
        notes = [*notes[:MOST], f"{len(notes) - MOST:,} more of these: other runs were asked other numbers of rows, too."]
    return notes
