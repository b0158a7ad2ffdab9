"""Numbers made of numbers: means by hand, floors, parts that are missing, and LUME's final score from its published definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.data.sources import rows
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.aggregates import Aggregate, aggregates
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

ROOT = Path(__file__).parent.parent


def number(title: str, of: str, **values: float) -> dict[str, Any]:
    return {"title": title, "set": of, "values": {column: {"value": value} for column, value in values.items()}}


NUMBERS = [number("rouge", "retain", after=0.8, before=0.9), number("rouge", "forget", after=0.3, before=1.0)]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [("arithmetic", (0.8 + 0.7) / 2), ("harmonic", 2 / (1 / 0.8 + 1 / 0.7)), ("geometric", (0.8 * 0.7) ** 0.5)],
)
def test_means_by_hand(mean: Any, expected: float) -> None:
    one = Aggregate(title="both", of=("rouge on retain", "1 - rouge on forget"), mean=mean)
    (found,) = aggregates([one], NUMBERS, ["before", "after"])
    assert found["values"]["after"]["value"] == pytest.approx(expected)
    assert found["values"]["before"]["value"] == pytest.approx(0.45 if mean == "arithmetic" else 0)
    assert "mean of rouge on retain, 1 - rouge on forget" in found["definition"]


def test_a_floor_makes_it_nothing_and_what_is_missing_is_said() -> None:
    floor = Aggregate(title="kept", of=("rouge on retain", "1 - rouge on forget"), at_least={"rouge on retain": 0.85})
    later = Aggregate(title="later", of=("kept on aggregates", "rouge on retain"))
    lost = Aggregate(title="lost", of=("rouge on retain", "acc on mmlu"))
    found = {one["title"]: one["values"] for one in aggregates([floor, later, lost], NUMBERS, ["before", "after"])}
    assert found["kept"]["after"]["value"] == 0 and found["kept"]["before"]["value"] == pytest.approx(0.45)
    assert found["later"]["before"]["value"] == pytest.approx((0.45 + 0.9) / 2)
    assert found["lost"]["after"] == {"missing": "acc on mmlu is not there"}


def test_parts_that_are_no_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts such as `rouge on retain`"):
        Aggregate(title="x", of=("rouge",))
    with pytest.raises(ValueError, match="at_least of its own parts"):
        Aggregate(title="x", of=("rouge on retain",), at_least={"rouge on forget": 0.5})
    (tmp_path / "s.yaml").write_text(
        "sets:\n  forget: {source: embedded:forget, prompt: question, answer: answer}\nmeasures: [{name: rouge, set: forget}]\n"
        "aggregates:\n  - {title: x, of: [rouge on forgte]}\n"
    )
    with pytest.raises(Refused, match=r"s.yaml:5: aggregates\[0\].of\[0\]: found 'forgte'; did you mean 'forget'"):
        suites.load(tmp_path / "s.yaml")


def test_a_star_stands_for_any_text(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(
        "".join(f'{{"id": "{name}", "q": "?", "a": "!"}}\n' for name in ("1asc1", "2aqa1", "3[sc]", "sc"))
    )
    source = Source(source=str(tmp_path / "r.jsonl"), prompt="q", answer="a", like={"id": "*sc*"})
    assert [row["id"] for row in rows(source)] == ["1asc1", "3[sc]", "sc"]


def test_lumes_final_score_is_as_published(tmp_path: Path) -> None:
    """From the parts to the number, by the definition in 2504.02883; with the lines that wait for the organisers' files."""
    (tmp_path / "lume.yaml").write_text((ROOT / "eval" / "lume.yaml").read_text().replace("#:", ""))
    suite = suites.load(tmp_path / "lume.yaml", ["sets.members.source=embedded:forget", "sets.members.text=question",
                        "sets.strangers.source=embedded:holdout", "sets.strangers.text=question"])  # fmt: skip
    values = {f"{side}_{task}_{kind}": 0.1 * task + (0.05 if kind == "sc" else 0.0) + (0.3 if side == "retain" else 0.0)
              for side in ("forget", "retain") for task in (1, 2, 3) for kind in ("sc", "qa")}  # fmt: skip
    numbers = [number("rouge" if name.endswith("sc") else "exact match", name, after=value) for name, value in values.items()]
    numbers += [number("membership secrecy loss", "members", after=0.6), number("acc", "mmlu", after=0.4)]
    parts = [1 - value if name.startswith("forget") else value for name, value in values.items()]
    task_aggregate = len(parts) / sum(1 / part for part in parts)
    found = {one["title"]: one["values"]["after"]["value"] for one in aggregates(suite.aggregates, numbers, ["after"])}
    assert found["task aggregate"] == pytest.approx(task_aggregate)
    assert found["final score"] == pytest.approx((task_aggregate + 0.6 + 0.4) / 3)
    numbers[-1] = number("acc", "mmlu", after=0.37)
    assert aggregates(suite.aggregates, numbers, ["after"])[1]["values"]["after"]["value"] == 0
