"""What a whole suite costs beside the forward, generation and backward calls that it contains, in one run.

`suite` is the project's own path, `llm-unlearn evaluate` from an empty cache of tables: models loaded, sets encoded, passes,
tables kept, measures with their bootstrap, `evaluation.parquet`; printing and the report are left out. `work` is what no suite
can do without, in plain calls with nothing around them: each answer once through the model and, where its tokens are, through
the head, in micro-batches of like length under the same budget of tokens; each text written by `generate` without an end, in
batches that are put together by what each row is going to write, which nobody can know beforehand, so that no row waits for a
longer one; and one row at a time forward and backward where the suite asks for norms of gradients.

Rounds alternate between the two. The breakdown is of the suite's own time, each second in one place. One thread; seconds are of the
processor, so that other jobs on the machine count little.

    python -m benchmarks.suite [--small] [--rounds 3] [--json FILE]                    # eval/full.yaml, embedded models
    python -m benchmarks.suite --tofu DIR [--model FOLDER] [--small] [--rounds 2]      # eval/tofu.yaml on TOFU's jsonl files

With `--tofu`, FOLDER is a model such as benchmarks/tofu/make_models.py trains; without it one of the same shape is made with
random weights, which ends no text: every one is as long as `--max-new-tokens`, on both sides. One model is asked, so what compares
with a retrained one has no value. `--small` takes 40 rows of each set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import GenerationConfig

from benchmarks.clock import Clock, watched
from llm_unlearn import look, results, run
from llm_unlearn.data.batch import Batch, cut, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.embedded import target
from llm_unlearn.evaluation import generation, likelihood, passes
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.desk import padded
from llm_unlearn.evaluation.generation import Ask
from llm_unlearn.models import scores
from llm_unlearn.models.load import Loaded, load
from llm_unlearn.report import page, terminal
from llm_unlearn.sections import Model

ROOT = Path(__file__).parents[1]
TOFU = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "holdout": "holdout10",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
STAGES = {
    "loading": [(look, "load"), (run, "start")],
    "encoding": [(look, "encode_sets")],
    "likelihood: model and head": [(likelihood, "score"), (scores.Head, "__call__")],
    "likelihood: statistics, layout": [(passes, "likelihood_pass"), (passes, "loss_pass"), (passes, "neighbours_pass")],
    "generation: model": [(transformers.GenerationMixin, "generate")],
    "generation: around it": [(passes, "generation_pass"), (passes, "samples_pass")],
    "gradients": [(passes, "gradient_pass")],
    "tables kept": [(passes, "write_part")],
    "measures and bootstrap": [(run, "results_of")],
    "rows and parquet": [(results, "records"), (results, "write_columns")],
}
"""Stage -> the functions whose time it is, where they are looked up. What one of them spends in another is the other's."""
WHOLE = frozenset({"gradients", "generation: model"})  # what these call is theirs


@dataclass
class Work:
    """What one model was asked for: seen once, done again without anything around it."""

    scored: list[Example] = field(default_factory=list)
    greedy: list[tuple[tuple[int, ...], int]] = field(default_factory=list)  # prompt, tokens until the text had ended
    drawn: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    sloped: list[Example] = field(default_factory=list)


@contextmanager
def quietly(clock: Clock) -> Iterator[None]:
    """Every stage's functions, timed; no page, and no table in the terminal."""
    shown = patch.object(page, "write_page", lambda *_: None), patch.object(terminal, "print_table", lambda *_: None)
    with shown[0], shown[1], watched(clock, STAGES):
        yield


@contextmanager
def noted(works: list[Work]) -> Iterator[None]:
    """What each model is asked for, model after model."""
    loading, scoring, slope, write = look.load, likelihood.score, likelihood.gradient_norm, generation.written

    def load_(*given: Any, **named: Any) -> Loaded:
        works.append(Work())
        return loading(*given, **named)

    def score(scorer: Any, head: Any, batch: Batch) -> Any:
        works[-1].scored.extend(batch.examples)
        return scoring(scorer, head, batch)

    def gradient_norm(model: Any, batch: Batch) -> float:
        works[-1].sloped.extend(batch.examples)
        return slope(model, batch)

    def written(loaded: Loaded, asks: Sequence[Ask], *more: Any) -> Iterator[tuple[int, list[int], bool]]:
        for i, text, ended in write(loaded, asks, *more):
            (works[-1].drawn if asks[i].temperature else works[-1].greedy).append((asks[i].prompt, len(text) + ended))
            yield i, text, ended

    with (
        patch.object(look, "load", load_),
        patch.object(likelihood, "score", score),
        patch.object(likelihood, "gradient_norm", gradient_norm),
        patch.object(generation, "written", written),
    ):
        yield


def bare(model: Any, work: Work, batch_tokens: int) -> Callable[[], dict[str, float]]:
    """The plain calls, laid out beforehand; what is returned does them and says how long each kind took."""
    weights = [weight.requires_grad_(False) for weight in model.parameters()]
    model.generation_config.eos_token_id = None
    lengths = [len(one.ids) for one in work.scored]
    batches = [lay_out([work.scored[i] for i in chosen]) for chosen in cut(lengths, batch_tokens)[0]]
    written = sorted([*work.greedy, *work.drawn], key=lambda one: (-one[1], -len(one[0])))
    texts: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    while written:
        count = longest = 0
        while count < len(written):
            longest = max(longest, len(written[count][0]))
            if count and (longest + written[0][1]) * (count + 1) > batch_tokens:
                break
            count += 1
        chosen, written = written[:count], written[count:]
        texts.append((*padded([prompt for prompt, _ in chosen], 0, torch.device("cpu")), chosen[0][1]))
    rows = [lay_out([one]) for one in work.sloped]
    chunk = max(1, scores.CHUNK // model.config.vocab_size)

    def logits(batch: Batch) -> list[torch.Tensor]:
        states = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[batch.at]
        return [model.lm_head(part) for part in states.split(chunk)]

    def do() -> dict[str, float]:
        began = time.process_time()
        with torch.no_grad():
            for batch in batches:
                logits(batch)
        scored = time.process_time()
        for ids, mask, length in texts:
            settings = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=0)
            model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        wrote = time.process_time()
        for weight in weights:
            weight.requires_grad_()
        for row in rows:
            loss = torch.nn.functional.cross_entropy(torch.cat(logits(row)), row.targets)
            torch.autograd.grad(loss, weights)
        for weight in weights:
            weight.requires_grad_(False)
        sloped = time.process_time()
        return {"forward": scored - began, "generation": wrote - scored, "forward and backward": sloped - wrote}

    return do


def prepare(options: argparse.Namespace, folder: Path) -> tuple[suites.Suite, dict[str, tuple[Model, str | None]]]:
    """The suite and the models that it is run on."""
    changes: list[str] = []
    if options.tofu:
        for name, file in TOFU.items():
            path = (options.tofu / f"{file}.jsonl").resolve()
            if not path.is_file():
                raise SystemExit(f"{path}: no such file; docs/results.md says where TOFU's files come from.")
            changes.append(f"sets.{name}.source={path}")
        sys.path.insert(0, str(ROOT / "benchmarks" / "tofu"))
        from make_models import random_model

        models = {"model": options.model or random_model(options.tofu, folder / "random")}
        changes += ["retrained=null", f"max_new_tokens={options.max_new_tokens or 64}"]
    else:
        found = target.models(options.cache)
        models = {"model": found["target"], "retrained": found["retrained"]}
        changes += [f"max_new_tokens={options.max_new_tokens}"] if options.max_new_tokens else []
    path = ROOT / "eval" / ("tofu.yaml" if options.tofu else "full.yaml")
    if options.small:
        changes += [f"sets.{name}.limit=40" for name in suites.load(path, changes).sets]
    return suites.load(path, changes), {column: (Model(base=str(base)), None) for column, base in models.items()}


def walked(works: list[Work]) -> dict[str, Mapping[str, int]]:
    """How many answers, prompts and rows there are, of all models, and how often the same one was taken at most."""
    kinds: dict[str, list[Counter[object]]] = {
        "answers scored": [Counter((one.answer, one.ids) for one in work.scored) for work in works],
        "greedy answers": [Counter(prompt for prompt, _ in work.greedy) for work in works],
        "answers drawn": [Counter(prompt for prompt, _ in work.drawn) for work in works],
        "rows with a gradient": [Counter(one.ids for one in work.sloped) for work in works],
    }
    return {
        kind: {
            "calls": sum(one.total() for one in found),
            "different": sum(len(one) for one in found),
            "most": max(max(one.values(), default=0) for one in found),
        }
        for kind, found in kinds.items()
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Alternating rounds; the first evaluation is for warming up and for seeing what is asked."""
    suite, asked = prepare(options, folder)
    rounds: list[dict[str, Any]] = []

    def evaluate(name: str) -> None:
        run.evaluate(suite, "suite", asked, cache=folder / name, output=folder / f"{name}.out")

    works: list[Work] = []
    with noted(works), quietly(Clock(time.process_time, WHOLE)):
        evaluate("first")
    models = [load(model, torch.device("cpu")).model for column, (model, _) in sorted(asked.items(), reverse=True)]
    jobs = [bare(model, work, suite.batch_tokens) for model, work in zip(models, works, strict=True)]
    for number in range(options.rounds):
        clock = Clock(time.process_time, WHOLE)
        with quietly(clock):
            evaluate(f"round {number}")
        clock.turn()
        plain: Counter[str] = Counter()
        for job in jobs:
            plain.update(job())
        rounds.append({"suite": dict(clock.seconds), "work": dict(plain), "ratio": clock.seconds.total() / plain.total()})
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "walked": walked(works),
        "rounds": rounds,
    }


def show(found: Mapping[str, Any]) -> None:
    def median(side: str, name: str) -> float:
        return statistics.median(one[side].get(name, 0.0) for one in found["rounds"])

    totals = {side: statistics.median(sum(one[side].values()) for one in found["rounds"]) for side in ("suite", "work")}
    for side in ("suite", "work"):
        print(f"{side:<34} {totals[side]:8.2f} s")
        for name in [*STAGES, "everything else"] if side == "suite" else found["rounds"][0]["work"]:
            print(f"  {name:<32} {median(side, name):8.2f} s")
    ratios = [one["ratio"] for one in found["rounds"]]
    print(f"suite / work: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)")
    for kind, counts in found["walked"].items():
        print(f"{kind}: {counts['calls']}, of which different {counts['different']}; the same one at most {counts['most']} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, metavar="DIR", help="folder with TOFU's jsonl files")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="with --tofu: the model that is asked")
    parser.add_argument("--max-new-tokens", type=int, help="longest text (default: 64 with --tofu, else the suite's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="40 rows of each set")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where the embedded models are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
