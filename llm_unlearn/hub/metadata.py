"""The front matter of a model card: what the hub itself reads, tags, base and an index of the numbers."""

from __future__ import annotations

from typing import Any

from llm_unlearn.hub.facts import Facts
from llm_unlearn.report.verdict import current, value_of
from llm_unlearn.source import is_shipped

TASK = "text-generation"


def metadata(facts: Facts) -> str:
    """The front matter as YAML, made by huggingface_hub."""
    from huggingface_hub import ModelCardData

    method = facts.recipe.get("method") or {}
    losses = [str(term["loss"]["name"]) for term in (facts.recipe.get("objective") or {}).values()]
    tags = ["llm-unlearn", "unlearning", "machine-unlearning", *losses, *([str(method["name"])] if method else [])]
    data = ModelCardData(
        base_model=facts.base if facts.base_on_hub else None,
        library_name="peft" if facts.kind == "adapter" else "transformers" if not facts.adapts else None,
        pipeline_tag=TASK,
        tags=tags + (["lora"] if facts.adapts else []),
        model_name=facts.repo_id.rpartition("/")[2],
        eval_results=evaluations(facts) or None,
    )
    return str(data.to_yaml())


def evaluations(facts: Facts) -> list[Any]:
    """Every number of the model that is published, as the hub's index of models reads it."""
    from huggingface_hub import EvalResult

    found = []
    for number in (facts.results or {}).get("numbers", ()):
        value = value_of(number, current(number))
        if value is None:
            continue
        source = (facts.results or {}).get("suite_settings", {}).get("sets", {}).get(number["set"]) or {}
        name = str(source.get("source", ""))
        on_hub = name in facts.data_on_hub
        kind = name if on_hub else "embedded" if is_shipped(name) else "private"
        found.append(
            EvalResult(
                task_type=TASK, dataset_type=kind, dataset_name=str(number["set"]),
                dataset_config=source.get("config") if on_hub else None, dataset_split=str(number["set"]),
                metric_type=str(number["measure"]), metric_name=str(number["title"]), metric_value=value,
            )
        )  # fmt: skip
    return found
