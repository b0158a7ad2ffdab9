"""Models whose logits are made of several models' logits, against the members, each asked by itself, combined in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from jobs import ROOT, adapted, away, job, weights
from test_passes import SOURCE
from test_scores import ARCHITECTURES, examples
from test_whitebox import make_sets
from torch import Tensor

from llm_unlearn import recipe, retrained
from llm_unlearn.attacks import asking
from llm_unlearn.attacks.adapter_removal import AdapterRemoval
from llm_unlearn.attacks.finding import Subject
from llm_unlearn.attacks.gcg import GCG
from llm_unlearn.attacks.layers import ActivationPatching, LayerProbe, LogitLens
from llm_unlearn.attacks.quantization import Quantization
from llm_unlearn.attacks.relearning import Relearning
from llm_unlearn.attacks.rewrites import Rewrites
from llm_unlearn.attacks.shadows import Shadows
from llm_unlearn.attacks.soft_prompt import SoftPrompt
from llm_unlearn.attacks.two_model import TwoModel
from llm_unlearn.data.batch import lay_out
from llm_unlearn.evaluation.generation import Ask, written
from llm_unlearn.evaluation.passes import tables_of
from llm_unlearn.evaluation.sets import encode_set
from llm_unlearn.hub.fetching import COMBINATION_FILE
from llm_unlearn.methods.combination import Combination
from llm_unlearn.methods.contrast import ULD, Contrast, Guided
from llm_unlearn.methods.edits import strengths_of
from llm_unlearn.models import combined
from llm_unlearn.models.forms import Again, adapter_scaled
from llm_unlearn.models.load import Loaded, add_adapter, causal, folder_identity, load, put_on
from llm_unlearn.models.scores import Scorer, embedding_of, head_of, score
from llm_unlearn.models.trials import check_head
from llm_unlearn.plan import plan
from llm_unlearn.requests import service
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.spec import Refused
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.edits import edit

TOLERANCE = 5e-4
"""Of float32 logits of size 10, of which some are subtracted."""
NAMES = ("first", "second")
RULES = {
    "uld": Combination(rule="sum", members=(None, "first"), weights=(1.0, -0.8)),
    "guided": Combination(rule="excess", members=(None, "second"), weights=(1.0, -1.5)),
    "average": Combination(rule="average", members=NAMES, weights=(0.5, 0.5)),
    "three": Combination(rule="sum", members=("first", None, "second"), weights=(0.5, 1.0, -0.7)),
}
each_rule = pytest.mark.parametrize("wanted", RULES.values(), ids=RULES)


def saved(net: Callable[[], Any], folder: Path) -> Callable[[str | None], Any]:
    """Two adapters in folders of their names, and each member as a model of its own, float64, by its name."""
    for seed, name in enumerate(NAMES):
        away(add_adapter(net(), Adapter(rank=2), seed), 0.3 + 0.2 * seed).save_pretrained(str(folder / name))

    @cache
    def member(name: str | None) -> Any:
        one = net().double()  # before the adapter is merged, so that nothing is rounded to float32
        return (put_on(one, folder / name).merge_and_unload() if name else one).eval()

    return member


def reference(member: Callable[[str | None], Any], wanted: Combination, ids: Tensor) -> Tensor:
    """(B, L, V) by the definition, each member asked by itself."""
    with torch.no_grad():
        z = [member(name)(input_ids=ids, use_cache=False).logits for name in wanted.members]
    if wanted.rule == "average":
        return sum((w * one.softmax(-1) for w, one in zip(wanted.weights, z, strict=True)), torch.zeros_like(z[0])).log()
    if wanted.rule == "excess":
        z = [z[0], *(torch.where(one > z[0], one - z[0], 0.0) for one in z[1:])]
    return sum((w * one for w, one in zip(wanted.weights, z, strict=True)), torch.zeros_like(z[0]))


@pytest.mark.parametrize("name", ARCHITECTURES)
@each_rule
def test_logits_are_those_of_the_members_combined(name: str, wanted: Combination, tmp_path: Path) -> None:
    def net() -> Any:
        torch.manual_seed(0)
        config = deepcopy(ARCHITECTURES[name])
        config.initializer_range = 0.2
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    member = saved(net, tmp_path)
    combined.write(wanted, tmp_path)
    model = put_on(net(), tmp_path).eval()
    check_head(model)
    rows = examples(3)
    batch = lay_out(rows)
    with torch.no_grad():
        own = model(input_ids=torch.tensor([rows[0].ids])).logits
        found = score(Scorer(model), head_of(model), batch)
    assert torch.allclose(own.double(), reference(member, wanted, torch.tensor([rows[0].ids])), atol=TOLERANCE)
    for stream, scores in found.items():
        mine = [row for row in batch.examples if row.stream == stream]
        expected = [reference(member, wanted, torch.tensor([row.ids]))[0, row.answer - 1 : -1] for row in mine]
        assert torch.allclose(scores.logits.double(), torch.cat(expected), atol=TOLERANCE)
        logp = torch.cat(expected).log_softmax(-1).gather(-1, scores.targets[:, None])[:, 0]
        assert torch.allclose(scores.logps.double(), logp, atol=TOLERANCE)


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str | None], Any]]:
    """A folder for combinations of the tiny model, and its members."""
    folder = tmp_path_factory.mktemp("adapters")
    return folder, saved(lambda: transformers.AutoModelForCausalLM.from_pretrained(tiny_base), folder)


Place = tuple[Path, Callable[[str | None], Any]]


def read(place: Place, base: Path, wanted: Combination) -> Loaded:
    combined.write(wanted, place[0])
    return load(Model(base=str(base), precision="fp32"), torch.device("cpu"), adapter=str(place[0]))


@each_rule
def test_what_is_written_is_what_the_combination_finds_likeliest(place: Place, tiny_base: Path, wanted: Combination) -> None:
    """Token by token, prompts of several lengths in one batch, some of which end before others; with the cache, and without."""
    loaded = read(place, tiny_base, wanted)
    torch.manual_seed(1)
    asks = [
        Ask(tuple(torch.randint(4, 1024, (2 + i % 5,)).tolist()), frozenset({3}), 4 + 3 * (i % 3), unfinished=True)
        for i in range(18)
    ]
    texts = {i: (text, ended) for i, text, ended in written(loaded, asks, 60, torch.device("cpu"))}  # four or so at once
    assert [*texts] != sorted(texts) == [*range(18)], "what ends sooner gives way to others"
    for i, ask in enumerate(asks):
        ids = list(ask.prompt)
        for _ in range(ask.limit):
            ids.append(int(reference(place[1], wanted, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == 3:
                break
        expected = ids[len(ask.prompt) :]
        assert texts[i] == (expected[:-1] if expected[-1] == 3 else expected, expected[-1] == 3)
    ids = torch.tensor([asks[0].prompt])
    ways = [loaded.model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)]
    assert torch.equal(*ways) and ways[0].shape[1] > ids.shape[1]


@each_rule
def test_the_passes_read_it_as_any_model(place: Place, tiny_base: Path, wanted: Combination, tokenizer: Any) -> None:
    loaded = read(place, tiny_base, wanted)
    one = encode_set("forget", SOURCE, ("answer", "generation", "gradient"), tokenizer)
    table = tables_of(loaded, {"forget": one}, Accelerator(cpu=True), batch_tokens=300, max_new_tokens=3, cache=None)["forget"]
    for a, example in enumerate(one.examples):
        logits = reference(place[1], wanted, torch.tensor([example.ids]))[0, example.answer - 1 : -1]
        part = slice(table.likelihood.start[a], table.likelihood.start[a + 1])
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(example.ids[example.answer :])[:, None])[:, 0]
        assert torch.allclose(torch.from_numpy(table.likelihood.logp[part]).double(), expected, atol=TOLERANCE)
    assert table.generated and len(table.generated) == 6


def test_a_combination_is_known_by_all_that_it_is_made_of(place: Place, tiny_base: Path) -> None:
    loaded = read(place, tiny_base, RULES["uld"])
    assert combined.combination_of(loaded.causal) == RULES["uld"]
    assert embedding_of(loaded.model)(torch.tensor([5])).shape == (1, 64)
    before = folder_identity(place[0])
    combined.write(replace(RULES["uld"], weights=(1.0, -0.9)), place[0])
    assert folder_identity(place[0]) != before
    combined.write(RULES["uld"], place[0])
    assert folder_identity(place[0]) == before
    file = place[0] / "first" / "adapter_config.json"
    text = file.read_text()
    file.write_text(text + " ")
    assert folder_identity(place[0]) != before
    file.write_text(text)


def test_what_stands_beside_the_base_is_taken_away_by_its_factor(place: Place, tiny_base: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for name in ("uld", "guided"):
        loaded, wanted = read(place, tiny_base, RULES[name]), RULES[name]
        for factor in (0.0, -1.0, 1.0):
            with adapter_scaled(loaded.model, factor), torch.no_grad():
                found = loaded.model(input_ids=ids).logits
            assert torch.allclose(found.double(), reference(place[1], wanted.scaled(factor), ids), atol=TOLERANCE)
    loaded = read(place, tiny_base, RULES["average"])
    with adapter_scaled(loaded.model, 0.0), torch.no_grad():
        found = loaded.model(input_ids=ids).logits.log_softmax(-1)
    base = Combination(rule="sum", members=(None, "first"), weights=(1.0, 0.0))
    assert torch.allclose(found.double(), reference(place[1], base, ids).log_softmax(-1), atol=TOLERANCE)


def test_what_no_weights_can_do_is_refused(place: Place, tiny_base: Path, tmp_path: Path) -> None:
    combined.write(RULES["uld"], place[0])
    base = Model(base=str(tiny_base), precision="fp32")
    with pytest.raises(Refused, match="cannot be merged"):
        Again(base, str(place[0]), torch.device("cpu"))(merged=True)
    with pytest.raises(Refused, match=r"model\.start: .* no one set of weights"):
        load(replace(base, start=str(place[0])), torch.device("cpu"))
    loaded = load(base, torch.device("cpu"), adapter=str(place[0]))
    with pytest.raises(Refused, match="hidden states of its own"):
        Scorer(loaded.model)(torch.tensor([[5, 6]]), torch.tensor([0]), (0,))
    with pytest.raises(ValueError, match="a cache of another model"):
        plain = place[1](None)(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
        loaded.model(input_ids=torch.tensor([[5]]), past_key_values=plain)
    with pytest.raises(Refused, match="'third' is no adapter of this model; there are first"):
        combined.combine(loaded.causal, Combination(rule="sum", members=(None, "third"), weights=(1.0, 1.0)))


MERGED, INSIDE = "it cannot be merged", "hidden states of its own"
ATTACKS: dict[Any, str | None] = {
    Relearning(set="forget", steps=1): MERGED,
    Quantization(set="forget", formats=("nf4",)): MERGED,
    Quantization(set="forget", formats=("nf4",), merged=False): None,
    AdapterRemoval(set="forget", factors=(0.0,)): None,
    LogitLens(): INSIDE,
    LayerProbe(trained_on="retain"): INSIDE,
    ActivationPatching(): INSIDE,
    SoftPrompt(tokens=2, steps=1): None,
    GCG(tokens=2, swaps=4, steps=1, rows=2): None,
    Rewrites(kinds=("as_asked",), max_new_tokens=2): None,
    TwoModel(scales=(1.4,)): None,
}


@pytest.mark.parametrize("name", ["guided", "average"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.title)
def test_an_attack_acts_or_says_in_one_sentence_why_it_cannot(
    attack: Any, name: str, place: Place, tiny_base: Path, tokenizer: Any
) -> None:
    loaded, model = read(place, tiny_base, RULES[name]), Model(base=str(tiny_base), precision="fp32")
    load_after, load_before = (Again(model, adapter, torch.device("cpu"), adapter or "") for adapter in (str(place[0]), None))
    sets, one = make_sets(tokenizer), Accelerator(cpu=True)
    subject = Subject("after", model, str(place[0]), load_after, sets, load_before, one, 4096, 0, lambda text: None)
    if said := ATTACKS[attack]:
        with pytest.raises(Refused, match=said) as error:
            attack(subject)
        assert "\n" not in str(error.value)
        return
    curve = attack(subject)
    assert all(math.isfinite(value) for value in curve.y)
    if isinstance(attack, AdapterRemoval):
        asked = asking.answers_of(subject.sets["forget"])
        alone = [asking.known(one, asked, "probability", subject).value for one in (loaded, load_before())]
        assert curve.y == pytest.approx(alone, rel=1e-4) and abs(alone[0] / alone[1] - 1) > 0.01


def test_a_combined_model_is_no_control_no_shadow_and_no_begin_of_a_later_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name = "recipes/methods/uld.yaml"
    assert "the model runs 2 times for every token" in plan(recipe.load(Path(name)), tmp_path).text
    for one in (name, "recipes/methods/sisa.yaml"):
        with pytest.raises(Refused, match=f"retrained: {one}: {Path(one).stem} makes a model of several parts"):
            retrained.found(one, tmp_path)
    with pytest.raises(Refused, match="cannot forget by a recipe with method: uld"):
        Shadows(recipe=name, set="forget", against="holdout", retain="retain").forgetting()
    file = tmp_path / "requests.yaml"
    file.write_text(service.TEMPLATE.replace("recipes/forget_lora.yaml", str(ROOT / name)).replace("eval/", f"{ROOT}/eval/"))
    with pytest.raises(Refused, match="recipe: uld leaves the logits of several models combined"):
        service.load(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": [1.0]}, "a weight for each"),
        ({"members": [None, "../first"]}, "names of folders"),
        ({"members": [None, "nobody"]}, "'nobody': no such folder"),
        ({"rule": "average"}, "above 0"),
        ({"rule": "product"}, "rule: "),
        ({"weight": 1}, "weight: "),
    ],
)
def test_a_file_that_says_no_combination_is_refused(place: Place, change: dict[str, Any], said: str) -> None:
    combined.write(RULES["uld"], place[0])
    file = place[0] / COMBINATION_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Refused, match=r"combination\.json") as error:
        combined.read(place[0])
    assert said in str(error.value)


@pytest.mark.parametrize("method", [ULD(weight=(0.2, 0.6)), Guided(alpha=(0.5, 2.0))], ids=["uld", "guided"])
def test_a_method_takes_the_strength_at_which_the_combination_is_nearest(
    method: Contrast, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Its log has the perplexities of the combinations, by the definition, and the aim is put where the second one is."""
    looked = Stop(until=1.0, rows=100, budget=Harm(retain_perplexity=None))

    def run(name: str, stop: Stop, aim: float) -> tuple[Any, Any, Combination | None, list[dict[str, Any]]]:
        model = adapted(make_model)
        wanted = job(20, terms=method.terms, stop=stop, aim=aim)
        outcome, _, found = edit(method, wanted, model, Accelerator(cpu=True), tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return model, outcome, found, [row for row in rows if method.knob in row]

    model, _, _, rows = run("far", looked, 1e9)
    z, total, count = [], torch.tensor(0.0, dtype=torch.float64), 0
    for row in job().examples["forget"]:
        with torch.no_grad():
            with model.disable_adapter():
                base = causal(model)(input_ids=torch.tensor([row.ids])).logits[0, row.answer - 1 : -1].double()
            tuned = causal(model)(input_ids=torch.tensor([row.ids])).logits[0, row.answer - 1 : -1].double()
        s = strengths_of(method)[1]
        z = base - s * tuned if isinstance(method, ULD) else base - s * (tuned - base).clamp(min=0)
        total -= z.log_softmax(-1).gather(-1, torch.tensor(row.ids[row.answer :])[:, None]).sum()
        count += len(row.ids) - row.answer
    perplexity = float((total / count).exp())
    assert rows[1]["forget_perplexity"] == pytest.approx(perplexity, rel=1e-3)
    _, outcome, found, rows = run("near", looked, perplexity)
    assert found == method.combination(strengths_of(method)[1]) and outcome.kept == outcome.step == rows[1]["step"]
    harmless = replace(looked, budget=Harm(retain_perplexity=1e-6))
    model, outcome, found, _ = run("none", harmless, perplexity)
    assert found is None and outcome.kept == 0 and torch.equal(weights(model), weights(adapted(make_model)))
