"""The model card: what a stranger has to know who decides whether to trust the model. Pure functions on plain data that has been
`described`; whatever comes from names and settings is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from llm_unlearn.hub import limits
from llm_unlearn.hub.facts import Facts
from llm_unlearn.hub.markup import code, fenced, listed, marked, papers, quoted, table
from llm_unlearn.hub.metadata import metadata
from llm_unlearn.report.headline import headline
from llm_unlearn.report.verdict import (
    Number,
    by_set,
    columns_of,
    gained,
    interval_of,
    judge,
    settings_text,
    shown,
    value_of,
)
from llm_unlearn.source import is_shipped

OF_SEVERAL = ("forget_quality", "model_utility")
"""Measures whose n counts the rows of other sets or models too."""


def card(facts: Facts) -> str:
    """The whole README.md, with its metadata."""
    from huggingface_hub import ModelCard

    return str(ModelCard(f"---\n{metadata(facts)}\n---\n{body(facts)}"))


def body(facts: Facts) -> str:
    """The card's text in Markdown."""
    name = facts.repo_id.rpartition("/")[2]
    parts = [
        f"# {marked(name)}",
        _failed(facts.failed),
        _opening(facts),
        "## What was forgotten", _data(facts),
        "## How", _method(facts),
        "## What is left of it", _numbers(facts.results),
        "## Thresholds", _thresholds(facts.results),
        "## Attacks", _attacks(facts.results),
        "## Limits", listed(limits.of(facts)),
        "## How to load it", _loading(facts),
        "## Measure it again", _again(facts),
        "## Versions and hashes", _exactly(facts),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _failed(failed: Sequence[str]) -> str:
    if not failed:
        return ""
    lines = "\n".join(f"> - {marked(one)}" for one in failed)
    return f"> **Published although it does not hold what it should.** Its publisher was told, and pushed it anyway:\n>\n{lines}"


def _opening(facts: Facts) -> str:
    what = {
        "adapter": "A LoRA adapter for",
        "combination": "LoRA adapters, whose logits are combined, for",
        "model": "A whole model, made of",
        "merged": "A whole model, made of",
    }[facts.kind]
    merged = " with its adapter merged" if facts.kind == "merged" else ""
    at = f" at revision {code(facts.base_revision)}" if facts.base_revision else ""
    start = f"{what} {code(facts.base)}{at}{merged}, which was made to forget given rows of data with llm-unlearn."
    return start + (f"\n\n**{marked(headline(facts.results))}**" if facts.results else "")


def _data(facts: Facts) -> str:
    """Counts, columns and kinds of sources; no row and no value."""
    data, lines = facts.recipe["data"], []
    further = data.get("streams") or {}
    uses = {"forget": "to be forgotten", "retain": "to be kept", **dict.fromkeys(further, "to be kept")}
    for name, use in {**uses, "holdout": "never seen, to compare with"}.items():
        source = {**data, **further}.get(name)
        if source:
            lines.append(f"**{name}** ({use}): {_source(source, facts.data_on_hub)}.{_measured(facts.results, name)}")
    text = "The rows themselves are not published, nor the values that chose them."
    return f"{listed(lines)}\n\n{text}"


def _source(source: Mapping[str, Any], on_hub: frozenset[str]) -> str:
    name = str(source["source"])
    if name in on_hub:
        where = f"rows of the data set {code(name)} on the hub"
        where += f", configuration {code(source['config'])}" if source.get("config") else ""
        where += f", split {code(source['split'])}" if source.get("split") else ""
    elif is_shipped(name):
        where = "made-up people that come with llm-unlearn"
    else:
        kind = name.rpartition(".")[2].lower()
        where = f"rows of a local {kind} file" if kind in ("json", "jsonl", "csv", "parquet", "txt") else "rows of local files"
    columns = [str(source[key]) for key in ("prompt", "answer", "messages", "text") if source.get(key)]
    parts = [where, f"column{'s' if len(columns) > 1 else ''} {' and '.join(map(code, columns))}"]
    for key, words in (("where", "chosen"), ("without", "left out"), ("like", "chosen")):
        if source.get(key):
            parts.append(f"{words} by the value of {', '.join(map(code, source[key]))}")
    if source.get("limit"):
        parts.append(f"the first {source['limit']:,}")
    return ", ".join(parts)


def _measured(results: Mapping[str, Any] | None, name: str) -> str:
    """On how many rows a set was measured."""
    sizes = [
        found["n"]
        for number in (results or {}).get("numbers", ())
        if number["set"] == name and "against" not in number["settings"] and number["measure"] not in OF_SEVERAL
        for found in number["values"].values()
        if "n" in found
    ]  # fmt: skip
    return f" Measured on {max(sizes):,} rows." if sizes else ""


def _method(facts: Facts) -> str:
    lines = [
        f"**{marked(one.part)}**: {code(one.name)}{f' × {one.weight}' if one.weight else ''} — {papers(one.text)}"
        for one in facts.papers
    ]
    model, train, run = facts.recipe["model"], facts.recipe["train"], (facts.results or {}).get("run")
    if model.get("adapter"):
        adapter = model["adapter"]
        lines.append(f"Trained: a LoRA adapter of rank {adapter['rank']}, alpha {adapter['alpha']:g}; the base was frozen.")
    else:
        some = f", those named {', '.join(map(code, model['trainable']))}" if model.get("trainable") else ""
        lines.append(f"Trained: the full weights{some}.")
    if run:
        ended = f"{run['status']} after {run['steps']} steps" + (f": {run['reason']}" if run.get("reason") else "")
        kept = "" if run["kept_step"] == run["steps"] else f"; the weights of step {run['kept_step']} were kept"
        settings = f"Learning rate {train['lr']:g}, optimizer {code(train['optimizer'])}, seed {run['seed']}."
        lines.append(f"The run {marked(ended + kept)}. {settings}")
    return listed(lines) + "\n\nEvery setting is in [recipe.yaml](recipe.yaml)."


def _numbers(results: Mapping[str, Any] | None) -> str:
    if not results:
        return "It was not measured."
    columns = columns_of(results)
    rows = [["measure", *map(marked, columns), "judgement"]]
    for name, numbers in by_set(results).items():
        rows.append([f"**{marked(name)}**", *("" for _ in columns), ""])
        rows += [[marked(one["title"]), *(_cell(one, column) for column in columns), judge(one)] for one in numbers]
    counted = "Values with their 95 % bootstrap interval over rows. `before` is the model before unlearning, `after` this one, "
    counted += "`retrained` one that never saw the forget set: forgetting is right where `after` is like `retrained`, and nothing "
    counted += "else was to change. Every definition is in [evaluation.json](evaluation.json)."
    missing = dict.fromkeys(
        str(found["missing"])
        for one in results["numbers"]
        for found in one["values"].values()
        if found.get("value") is None and found.get("missing")
    )
    reasons = "".join(f"\n\nWhere there is none (—): {marked(one)}." for one in missing)
    return f"{counted}\n\n{table(rows)}{reasons}"


def _cell(number: Number, column: str) -> str:
    value, interval = value_of(number, column), interval_of(number, column)
    if value is None:
        return "—"
    return shown(value) + (f" ({shown(interval[0])}–{shown(interval[1])})" if interval else "")


def _thresholds(results: Mapping[str, Any] | None) -> str:
    found = (results or {}).get("thresholds") or ()
    if not found:
        return "None were set: the numbers above are what came out, not what had to come out."
    rows = [["measure", "set", "asked", "found", "holds"]]
    for one in found:
        value = "—" if one.get("value") is None else shown(float(one["value"]))
        rows.append([*(marked(str(one[key])) for key in ("measure", "set", "asked")), value, "yes" if one["holds"] else "**no**"])
    return table(rows)


def _attacks(results: Mapping[str, Any] | None) -> str:
    attacks = (results or {}).get("attacks") or ()
    if not attacks or not results:
        return "None were tried."
    columns = columns_of(results)
    rows = [["attack", "settings", *map(marked, columns), "came back"]]
    for one in attacks:
        values = [shown(float(found["value"])) if (found := gained(one, column)) else "—" for column in columns]
        share = one["gap"]["came_back"]
        back = "" if share is None else f"{100 * share:.0f} %"
        rows.append(
            [marked(one["title"]), marked(settings_text(one["settings"])), *values, f"**{back}**" if one["gap"]["leaks"] else back]
        )
    said = "What each attack gets from a model at its best; *came back* is the share of what was forgotten, beyond what also comes "
    said += "out of the control. Bold is a leak."
    findings = listed(f"{marked(one['title'])}: {marked(one['finding'])}" for one in attacks if one.get("finding"))
    return f"{said}\n\n{table(rows)}\n\n{findings}"


def _loading(facts: Facts) -> str:
    if not facts.adapts:
        return fenced(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({quoted(facts.repo_id)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({quoted(facts.repo_id)})",
        )
    if facts.kind == "combination":
        return "Its logits are made of several adapters' (`combination.json`), which peft by itself does not do. " + _by_us(facts)
    if not facts.base_on_hub:
        return "Its base is not on the hub under a name. " + _by_us(facts)
    at = f", revision={quoted(facts.base_revision)}" if facts.base_revision else ""
    return fenced(
        "python",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({quoted(facts.base)}{at})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted(facts.base)}{at})\n"
        f"model = PeftModel.from_pretrained(base, {quoted(facts.repo_id)})",
    )


def _by_us(facts: Facts) -> str:
    if is_shipped(facts.base):
        return f"llm-unlearn makes {code(facts.base)} on first use, and puts this on it: the command below."
    if facts.base_on_hub:
        return "llm-unlearn loads it: the command below."
    return f"Whoever has {code(facts.base)} loads it with llm-unlearn: the command below, with the folder of the base."


def _again(facts: Facts) -> str:
    place = f"--model {shlex.quote(facts.repo_id)}"
    if facts.adapts and not facts.base_on_hub and not is_shipped(facts.base):
        place = f"--model FOLDER_OF_THE_BASE --adapter {shlex.quote(facts.repo_id)}"
    elif not facts.adapts and not facts.recipe["model"].get("start"):  # an adapter names its base itself
        base = facts.base if facts.base_on_hub or is_shipped(facts.base) else "FOLDER_OF_THE_BASE"
        place += f" --before {shlex.quote(base)}"
    bits = facts.recipe["model"].get("quantize")
    words = f"llm-unlearn evaluate {shlex.quote(facts.suite) if facts.suite else 'SUITE.yaml'} {place}"
    if bits and facts.adapts:
        words += f" --quantize {bits}"
    if facts.results and "retrained" in facts.results.get("models", {}):
        name = str(facts.results["models"]["retrained"]["name"])
        words += f" --retrained {shlex.quote(name) if name.startswith('embedded:') else 'RETRAINED'}"
    own = (
        ""
        if facts.suite
        else "\n\nThe suite is its publisher's own and reads data that is not published; `evaluation.json` has its settings."
    )
    return fenced("sh", words) + own


def _exactly(facts: Facts) -> str:
    run = (facts.results or {}).get("run") or {}
    lines = [f"recipe {code(facts.recipe_hash)}, of the whole recipe; what is withheld in [recipe.yaml](recipe.yaml) is part of it"]
    if facts.results:
        lines.append(f"suite {code(facts.results['suite'])}, {code(facts.results['suite_hash'])}")
        known = ", ".join(f"{marked(column)} {code(one['identity'])}" for column, one in facts.results["models"].items())
        lines.append(f"weights, chat template and precision of the models that were measured, each as one fingerprint: {known}")
    if run.get("versions"):
        lines.append(", ".join(f"{marked(name)} {code(number)}" for name, number in run["versions"].items()))
        processes = f"{run['processes']} process{'' if run['processes'] == 1 else 'es'}"
        lines.append(f"computed in {run['precision']} on {marked(run['device'])}, {processes}")
    rows = [["file", "bytes", "SHA-256"], *([code(path), f"{size:,}", code(sha)] for path, size, sha in facts.files)]
    return listed(lines) + (f"\n\n{table(rows)}" if facts.files else "")
