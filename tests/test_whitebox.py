"""Attacks on weights and prompts against closed forms: models patched into themselves, gradients by differences, own calls."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError

from llm_unlearn.attacks import gcg as searching
from llm_unlearn.attacks import soft_prompt as softly
from llm_unlearn.attacks.asking import answers_of as asked_of
from llm_unlearn.attacks.control import beyond, other_answers
from llm_unlearn.attacks.finding import Curve, Subject
from llm_unlearn.attacks.gcg import GCG, ends_of_prompts, losses_of, token_gradient
from llm_unlearn.attacks.layers import ActivationPatching, LayerProbe, LogitLens, patch, probe
from llm_unlearn.attacks.registry import OnPrompts, OnStates
from llm_unlearn.attacks.rewrites import TEMPLATES, Rewrites
from llm_unlearn.attacks.rows import answers_of, embedding_table, insert, read, split, words_of
from llm_unlearn.attacks.soft_prompt import SoftPrompt
from llm_unlearn.attacks.two_model import TwoModel
from llm_unlearn.bars import Bar
from llm_unlearn.chat import Chat
from llm_unlearn.data.batch import lay_out
from llm_unlearn.embedded import population
from llm_unlearn.evaluation import answering
from llm_unlearn.evaluation.answering import generation_pass
from llm_unlearn.evaluation.generation import Guide
from llm_unlearn.evaluation.passes import tables_of
from llm_unlearn.evaluation.sets import EncodedSet, encode_set
from llm_unlearn.models.load import Loaded, load, read_tokenizer
from llm_unlearn.models.scores import Scorer, embedding_of
from llm_unlearn.models.trials import last_norm
from llm_unlearn.objectives.views import TOP
from llm_unlearn.sections import Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused, by_name

SOURCE = Source(source="embedded:forget", prompt="question", answer="answer", paraphrase="paraphrased_answer",
                perturbed="perturbed_answer", limit=12)  # fmt: skip
NEEDS = ("answer", "paraphrase", "perturbed")
GERMAN = Source(source="embedded:german", prompt="question", answer="answer")


@pytest.fixture(scope="module")
def sets(tokenizer: Any) -> dict[str, EncodedSet]:
    return make_sets(tokenizer)


def make_sets(tokenizer: Any) -> dict[str, EncodedSet]:
    retain = replace(SOURCE, source="embedded:retain", limit=20)
    return {"forget": encode_set("forget", SOURCE, NEEDS, tokenizer), "retain": encode_set("retain", retain, NEEDS, tokenizer)}


def make_subject(
    sets: dict[str, EncodedSet], tokenizer: Any, net: Any, original: Any = None, batch_tokens: int = 4096, **changes: Any
) -> Subject:
    """A subject around a model; every `load` gives the same object, whose weights no attack here changes."""

    def loader(net: Any) -> Any:
        return lambda *, quantize=None, merged=False, adapter=True: Loaded(net, tokenizer, (str(id(net)),))

    wanted = Subject(
        "after", Model(base="none"), None, loader(net), sets, loader(original) if original is not None else None,
        Accelerator(cpu=True), batch_tokens, 5, lambda text: None,
    )  # fmt: skip
    return replace(wanted, **changes)


@pytest.fixture
def attacked(make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet]) -> Callable[..., Subject]:
    """A subject around a random model."""

    def make(net: Any = None, *more: Any, **changes: Any) -> Subject:
        return make_subject(sets, tokenizer, net if net is not None else make_model(num_hidden_layers=3), *more, **changes)

    return make


def own_logits(net: Any, example: Any) -> torch.Tensor:
    """(T, V) float64 logits before each target, by the model's own forward pass."""
    with torch.no_grad():
        logits: torch.Tensor = net(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1].double()
    return logits


def own_logp(net: Any, example: Any) -> float:
    """Mean log p per answer token."""
    logp = own_logits(net, example).log_softmax(-1)
    return float(logp.gather(-1, torch.tensor(example.ids[example.answer :])[:, None]).mean())


# ------------------------------------------------------------------------------------------------------------ the registry


def test_a_suite_can_name_them_without_torch() -> None:
    code = "import sys; import llm_unlearn.attacks.registry; print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_are_typed_and_refused() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[OnStates | OnPrompts, by_name])
    assert adapter.validate_json('{"name": "gcg", "steps": 3}', strict=True) == GCG(steps=3)
    for name in ("logit_lens", "layer_probe", "activation_patching", "soft_prompt", "gcg", "rewrites", "two_model"):
        one = adapter.validate_json(json.dumps({"name": name}), strict=True)
        assert one.set == "forget" and one.x.name and one.y.name and one.y.knowing in ("raises", "lowers")
        assert one.title.startswith(name.replace("_", " "))
        with pytest.raises(ValidationError):
            adapter.validate_json(json.dumps({"name": name, "budget": 3}), strict=True)
    for wrong in ({"kinds": ()}, {"kinds": ("as_asked", "as_asked")}, {"given": {"role_play": GERMAN}},
                  {"given": {"best of all": GERMAN}},
                  {"measure": "rouge", "max_new_tokens": 0}):  # fmt: skip
        with pytest.raises(ValidationError):
            Rewrites(**wrong)


@pytest.mark.parametrize("kind", [LogitLens, LayerProbe, SoftPrompt, GCG, Rewrites, TwoModel])
def test_a_set_that_is_not_there_is_refused(kind: Any, attacked: Callable[..., Subject]) -> None:
    with pytest.raises(Refused, match="forget, retain"):
        net = attacked().load().model
        kind(set="no")(attacked(net, net))


# ------------------------------------------------------------------------------------------------------------ rows, places


def test_readings_equal_one_call_per_row(attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=90)
    net, examples = subject.load().model, answers_of(subject, "test", "forget")
    assert len(examples) == 12
    found = read(subject.load(), subject, examples)
    assert np.allclose(found.logp, [own_logp(net, one) for one in examples], atol=1e-5)
    hits = [(own_logits(net, one).argmax(-1) == torch.tensor(one.ids[one.answer :])).double().mean() for one in examples]
    assert np.allclose(found.hits, hits) and np.array_equal(found.exact, np.array(hits) == 1)


def test_parts_are_drawn_from_the_seed_and_leave_nobody_out() -> None:
    first, other = split(20, 0.3, 1, "test")
    assert len(first) == 6 and sorted(first + other) == list(range(20))
    assert split(20, 0.3, 1, "test") == (first, other) != split(20, 0.3, 2, "test")
    with pytest.raises(Refused, match="leaves none"):
        split(1, 0.5, 1, "test")


def test_a_prompt_ends_before_the_templates_own_words(attacked: Callable[..., Subject], tokenizer: Any) -> None:
    subject = attacked()
    found, examples = subject.sets["forget"], answers_of(subject, "test", "forget")
    mark = tokenizer("!", add_special_tokens=False)["input_ids"]
    for example, prompt, answer, place in zip(
        examples, found.prompts, found.answers, ends_of_prompts(subject.load(), examples, found.prompts, found.chat), strict=True
    ):
        changed = insert(example, place, mark)
        assert tokenizer.decode(changed.ids) == f"<|user|>{prompt}!<|assistant|>{answer}<|end|>"
        assert changed.ids[changed.answer :] == example.ids[example.answer :]
    with pytest.raises(Refused, match="goes on in another way"):
        ends_of_prompts(subject.load(), [replace(examples[0], answer=examples[0].answer + 1)], found.prompts[:1], found.chat)
    assert ends_of_prompts(subject.load(), examples[:1], [""], found.chat) == [examples[0].answer]  # running text


# ------------------------------------------------------------------------------------------------------- embeddings, layers

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "gpt-neox": transformers.GPTNeoXConfig(**{name: size for name, size in SMALL.items() if name != "num_key_value_heads"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_given_its_own_embeddings_or_states_is_itself(name: str) -> None:
    """Bit for bit; and its last layer through its last norm is what its head reads."""
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    ids, at = torch.randint(1, 64, (3, 9)), torch.tensor([2, 5, 11, 12, 26])
    with torch.no_grad():
        own = Scorer(net)(ids, at, (0, 1, TOP))
        given = Scorer(net)(None, at, (0, 1, TOP), embeds=embedding_of(net)(ids))
        swapped = Scorer(net)(ids, at, swap={0: own[0], 1: own[1]})
        read_by_norm = last_norm(net)(own[1])
        moved = Scorer(net)(ids, at, swap={0: own[0] + torch.randn(own[0].shape)})
    assert all(torch.equal(own[layer], given[layer]) for layer in own)
    assert torch.equal(own[TOP], swapped[TOP]) and torch.equal(read_by_norm, own[TOP])
    assert not torch.allclose(own[TOP], moved[TOP], atol=1e-2)


def test_a_model_whose_norm_is_not_found_is_refused(make_model: Callable[..., Any]) -> None:
    net = make_model()
    net.model.norm.register_forward_hook(lambda part, given, made: made)  # still itself
    assert last_norm(net) is net.model.norm
    forward = net.model.forward

    def doubled(**given: Any) -> Any:
        made = forward(**given)
        made.last_hidden_state = made.last_hidden_state * 2
        return made

    net.model.forward = doubled
    with pytest.raises(Refused, match="norm under its head"):
        last_norm(net)


@pytest.mark.parametrize("measure", ["probability", "first_choice"])
def test_the_lens_on_the_last_layer_is_the_model_and_on_others_its_head(measure: Any, attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=90)
    net, examples = subject.load().model, answers_of(subject, "test", "forget")
    curve = LogitLens(measure=measure)(subject)
    assert curve.x == (0, 1, 2) and curve.low[1] <= curve.y[1] <= curve.high[1]
    whole = read(subject.load(), subject, examples)
    assert np.allclose(curve.rows, whole.probability if measure == "probability" else whole.hits, atol=1e-6)
    net.double()
    for layer in (0, 1):
        expected = []
        for one in examples:
            with torch.no_grad():
                states = net(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states[layer + 1]
                logp = net.lm_head(net.model.norm(states))[0, one.answer - 1 : -1].log_softmax(-1)
            targets = torch.tensor(one.ids[one.answer :])
            chosen = (
                logp.gather(-1, targets[:, None]).mean().exp()
                if measure == "probability"
                else (logp.argmax(-1) == targets).double().mean()
            )
            expected.append(float(chosen))
        assert np.isclose(curve.y[layer], np.mean(expected), atol=1e-5)
    assert curve.notes["at the strongest layer"] == max(curve.y) == curve.y[int(curve.notes["strongest layer"])]


def other_inside(net: Any, seed: int) -> Any:
    """A copy with other decoder layers, and the same embedding, last norm and head."""
    other = type(net)(net.config).eval()
    other.load_state_dict(net.state_dict())
    torch.manual_seed(seed)
    for weight in other.model.layers.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return other


def test_a_model_patched_into_itself_loses_nothing(attacked: Callable[..., Subject]) -> None:
    net = attacked().load().model
    assert ActivationPatching()(attacked(net, net)).y == (0.0, 0.0, 0.0)
    with pytest.raises(Refused, match="before unlearning"):
        ActivationPatching()(attacked(net))


def test_patching_every_layer_gives_the_other_models_numbers(attacked: Callable[..., Subject]) -> None:
    net = attacked().load().model
    other = other_inside(net, 1)
    subject = attacked(other, net, batch_tokens=90)
    examples = answers_of(subject, "test", "forget")
    assert subject.original
    whole, (every, last) = patch(subject, subject.load(), subject.original(), examples, [(0, 1, 2), (2,)])
    theirs = read(subject.load(), subject, examples).logp
    assert np.allclose(whole.logp, [own_logp(net, one) for one in examples], atol=1e-5)
    assert np.allclose(every.logp, theirs, atol=1e-6) and np.allclose(last.logp, theirs, atol=1e-6)
    curve = ActivationPatching()(subject)
    assert np.allclose(curve.y[2], (whole.logp - theirs).mean()) and abs(curve.y[0] - curve.y[2]) > 1e-3
    for layer in (0, 1):  # by a hook of our own, one row at a time
        drops = []
        for one in examples:
            ids, places = torch.tensor([one.ids]), slice(one.answer - 1, len(one.ids) - 1)
            with torch.no_grad():
                states = other(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]

                def put(block: Any, given: Any, made: Any, states: Any = states, places: slice = places) -> Any:
                    made = made.clone()
                    made[:, places] = states[:, places]
                    return made

                handle = net.model.layers[layer].register_forward_hook(put)
                patched = own_logp(net, one)
                handle.remove()
            drops.append(own_logp(net, one) - patched)
        assert np.isclose(curve.y[layer], np.mean(drops), atol=1e-5)


def test_models_that_cannot_be_patched_say_so(attacked: Callable[..., Subject], make_model: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match="differ"):
        ActivationPatching()(attacked(make_model(num_hidden_layers=3), make_model()))


# ---------------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_is_scikit_learns(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(classes)
    centres = rng.normal(size=(classes, 6))
    index = rng.integers(0, classes, 80)
    given, asked = centres[index] + rng.normal(size=(80, 6)), rng.normal(size=(9, 6))
    given[:, 5] = asked[:, 5] = 3.0  # a coordinate without spread
    scale = StandardScaler().fit(given)
    names = np.array([f"class {i}" for i in index])
    scores, found = probe(given, names, asked, penalty=0.5)
    theirs = LogisticRegression(C=2.0, tol=1e-10, max_iter=5000).fit(scale.transform(given), names)
    if classes > 2:  # with two, scikit-learn has one vector for both, whose penalty counts once
        expected = theirs.predict_proba(scale.transform(asked))
        ours = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        assert found.tolist() == theirs.classes_.tolist() and np.allclose(ours, expected, atol=1e-4)
    else:
        half = LogisticRegression(C=4.0, tol=1e-10, max_iter=5000).fit(scale.transform(given), names)
        assert np.allclose(scores[:, 1] - scores[:, 0], half.decision_function(scale.transform(asked)), atol=1e-3)


def test_the_probe_reads_what_stands_in_the_states(attacked: Callable[..., Subject]) -> None:
    """Its accuracy is scikit-learn's on hidden states of own calls; chance is what it says; small sets are refused."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    subject = attacked(batch_tokens=90)
    kinds = tuple(Source(source=f"embedded:{name}", prompt="question", answer="fact") for name in ("forget", "retain"))
    curve = LayerProbe(labels=kinds, trained_on="retain")(subject)
    assert curve.notes["chance"] == pytest.approx(3 / 12) and curve.notes["trained"] == 20 and curve.notes["tested"] == 12
    states: dict[str, list[Any]] = {}
    classes: dict[str, list[str]] = {}
    for name in ("forget", "retain"):
        states[name] = []
        for one in answers_of(subject, "test", name):
            with torch.no_grad():
                layers = subject.load().model(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states
            states[name].append(layers[2][0, one.answer - 1].numpy())
        classes[name] = [one.rpartition("/")[2] for one in subject.sets[name].ids]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=2000)).fit(states["retain"], classes["retain"])
    hits = theirs.predict(states["forget"]) == np.array(classes["forget"])
    assert curve.y[1] == hits.mean() and 0 < curve.y[1] < 1
    truth = LayerProbe()(subject)
    assert truth.notes["chance"] == pytest.approx(0.2) and truth.notes["classes"] == 2
    assert truth.notes["trained"] == 6 * 5 and truth.notes["tested"] == 6
    assert LayerProbe()(attacked(batch_tokens=9000)).y == truth.y
    with pytest.raises(Refused, match="a probe needs 20 and 2"):
        LayerProbe(labels=(replace(kinds[0], answer="keyword"),))(subject)
    with pytest.raises(Refused, match="none of `labels`"):
        LayerProbe(labels=(kinds[1],))(subject)
    plain = {"forget": replace(subject.sets["forget"], **only_answers(subject.sets["forget"]))}
    with pytest.raises(Refused, match="needs `labels`, or wrong answers"):
        LayerProbe()(replace(subject, sets=plain))


def only_answers(found: EncodedSet) -> dict[str, Any]:
    kept = [i for i, kind in enumerate(found.kind) if kind == "answer"]
    return {name: [getattr(found, name)[i] for i in kept] for name in ("row", "kind", "examples")}


# ----------------------------------------------------------------------------------------------------------- soft prompt


def test_a_prompt_of_no_tokens_changes_nothing(attacked: Callable[..., Subject]) -> None:
    subject = attacked()
    curve = SoftPrompt(tokens=0, steps=2, every=1, per_row=True)(subject)
    own = read(subject.load(), subject, answers_of(subject, "test", "forget")).probability
    assert curve.y[0] == curve.y[1] == curve.y[2] and curve.notes["true, after"] == pytest.approx(own.mean())


def test_before_it_moves_the_prompt_is_the_tokens_it_began_as(attacked: Callable[..., Subject], tokenizer: Any) -> None:
    subject = attacked()
    curve = SoftPrompt(tokens=4, steps=1, every=1)(subject)
    loaded, examples = subject.load(), answers_of(subject, "test", "forget")
    _, test = split(12, 0.5, 5, "test")
    drawn = np.random.default_rng([5, 13]).choice(words_of(tokenizer, len(embedding_table(loaded))), 4).tolist()
    own = [np.exp(own_logp(loaded.model, insert(examples[i], 0, drawn))) for i in test]
    assert curve.notes["true, before"] == pytest.approx(np.mean(own), rel=1e-4)
    assert not set(drawn) & {*tokenizer.all_special_ids}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_the_soft_prompts_loss_falls_whatever_is_asked_for(per_row: bool, control: Any, attacked: Callable[..., Subject]) -> None:
    wanted = SoftPrompt(tokens=3, steps=8, every=4, step=5e-3, per_row=per_row, control=control)
    curve = wanted(attacked())
    assert curve.x == (0, 4, 8) and curve.notes["loss, after"] < curve.notes["loss, before"] - 1e-2
    difference = curve.notes["true, after"] - curve.notes["control, after"]
    assert curve.y[-1] == pytest.approx(difference) and curve.y[-1] == pytest.approx(np.mean(curve.rows))
    assert wanted(attacked()) == curve
    small = wanted(attacked(batch_tokens=60))
    assert np.allclose(small.y, curve.y, atol=1e-5) and np.isclose(
        small.notes["loss, after"], curve.notes["loss, after"], atol=1e-4
    )


def test_the_soft_prompts_gradient_is_the_slope(attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=90)
    examples = [insert(one, 0, (0, 0)) for one in answers_of(subject, "test", "forget")[:4]]
    torch.manual_seed(0)
    for prompts in (torch.randn(1, 2, 32), torch.randn(4, 2, 32)):
        gradient, loss = softly._gradient(subject, subject.load(), examples, prompts, 0)
        way = torch.randn_like(prompts)
        near = [softly._gradient(subject, subject.load(), examples, prompts + e * way, 0)[1] for e in (2e-2, -2e-2)]
        assert np.isclose(float((gradient * way).sum()), (near[0] - near[1]) / 4e-2, rtol=2e-2)
        assert np.isclose(loss, -softly._read(subject, subject.load(), examples, prompts, 0).logp.mean(), rtol=1e-5)


PARTS = ([0, 2, 4, 6, 8], [1, 3, 5, 7])


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_the_control_never_asks_for_a_rows_own_answer(control: Any, attacked: Callable[..., Subject]) -> None:
    """Nor, when it is shuffled, for an answer of the other part; rows of no part keep their own."""
    subject = attacked()
    examples, loaded = answers_of(subject, "test", "forget"), subject.load()
    others = other_answers(subject, "test", loaded, examples, PARTS, control)
    assert others[9:] == examples[9:]
    for part in PARTS:
        own_answers = {examples[i].ids[examples[i].answer :] for i in part}
        for own, other in ((examples[i], others[i]) for i in part):
            assert own.ids[: own.answer] == other.ids[: other.answer] and own.ids[own.answer :] != other.ids[other.answer :]
            if control == "shuffled":
                assert other.ids[other.answer :] in own_answers
            else:
                assert len(own.ids) == len(other.ids) and own.ids[-1] == other.ids[-1]
    assert others == other_answers(subject, "test", loaded, examples, PARTS, control)
    assert others != other_answers(replace(subject, seed=6), "test", loaded, examples, PARTS, control)
    if control == "shuffled":
        with pytest.raises(Refused, match="test: the control needs rows with different answers, and 1 have one"):
            other_answers(subject, "test", loaded, examples, [[0]], control)


def test_what_goes_beyond_the_control_by_hand() -> None:
    true, control = ([np.array(rows) for rows in values] for values in (([0.1, 0.3], [0.5, 0.9]), ([0.0, 0.1], [0.6, 0.3])))
    curve = beyond([0, 10], true, control, {"more": 1.0})
    assert curve.x == (0, 10) and np.allclose(curve.y, (0.15, 0.25)) and np.allclose(curve.rows, (-0.1, 0.6))
    expected = {"true, before": 0.2, "true, after": 0.7, "control, before": 0.05, "control, after": 0.45,
                "gained beyond the control": 0.1, "true, steps to ½": 10, "more": 1}  # fmt: skip
    assert curve.notes == pytest.approx(expected)


def test_a_soft_prompt_stands_behind_the_beginning_of_text(attacked: Callable[..., Subject]) -> None:
    subject = attacked()
    loaded, examples = subject.load(), answers_of(subject, "test", "forget")[:2]
    assert softly._behind_bos(loaded, examples) == 0
    begun = [insert(one, 0, (loaded.tokenizer.convert_tokens_to_ids("<|end|>"),)) for one in examples]
    loaded.tokenizer.bos_token = "<|end|>"
    try:
        assert softly._behind_bos(loaded, begun) == 1
    finally:
        loaded.tokenizer.bos_token = None
    batch = lay_out([insert(one, 1, (0, 0)) for one in begun])
    made = softly._embeds(loaded, batch, [0, 1], torch.ones(1, 2, 32), 1)
    own = embedding_of(loaded.model)(batch.input_ids)
    assert torch.equal(made[:, 1:3], torch.ones(2, 2, 32))
    assert torch.equal(made[:, 0], own[:, 0]) and torch.equal(made[:, 3:], own[:, 3:])


# ------------------------------------------------------------------------------------------------------------------- gcg


def test_the_token_gradient_is_the_slope_towards_each_token(attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=90)
    loaded, examples = subject.load(), answers_of(subject, "test", "forget")[:3]
    places = ends_of_prompts(loaded, examples, subject.sets["forget"].prompts[:3], Chat())
    rows = list(zip(examples, places, strict=True))
    suffix = (40, 50, 60)
    slope = token_gradient(subject, loaded, rows, suffix)
    table = embedding_table(loaded).double()
    assert slope.shape == (3, len(table))
    net = loaded.model.double()
    for place, token in ((0, 77), (1, 300), (2, 500)):
        moved = []
        for share in (3e-3, -3e-3):  # not smaller: a norm computes in float32 whatever it is given
            total = 0.0
            for example, start in rows:
                whole = insert(example, start, suffix)
                embeds = table[torch.tensor([whole.ids])].clone()
                embeds[0, start + place] += share * (table[token] - table[suffix[place]])
                with torch.no_grad():
                    logp = net(inputs_embeds=embeds).logits[0, whole.answer - 1 : -1].double().log_softmax(-1)
                total -= float(logp.gather(-1, torch.tensor(whole.ids[whole.answer :])[:, None]).mean()) / len(rows)
            moved.append(total)
        assert np.isclose((moved[0] - moved[1]) / 6e-3, slope[place, token] - slope[place, suffix[place]], rtol=5e-3)


def test_losses_of_suffixes_equal_one_call_each(attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=90)
    loaded, examples = subject.load(), answers_of(subject, "test", "forget")[:3]
    rows = list(zip(examples, ends_of_prompts(loaded, examples, subject.sets["forget"].prompts[:3], Chat()), strict=True))
    suffixes = [(40, 50), (41, 50), (7, 300)]
    expected = [-np.mean([own_logp(loaded.model, insert(one, place, suffix)) for one, place in rows]) for suffix in suffixes]
    assert np.allclose(losses_of(subject, loaded, rows, suffixes), expected, atol=1e-5)


def test_each_swap_changes_one_token_for_one_of_the_steepest(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    slope, words = rng.normal(size=(3, 1024)), words_of(tokenizer, 1024)
    suffix = (40, 50, 60)
    slope[0, 40] = slope[1, tokenizer.all_special_ids[0]] = -99.0  # its own token, and one that is not allowed
    tried = GCG(candidates=5, swaps=200)._swaps(slope, words, suffix, rng)
    assert len(set(tried)) == len(tried) == 15
    for place in range(3):
        changed = {one[place] for one in tried if one[place] != suffix[place]}
        allowed = sorted((slope[place, word], word) for word in words if word != suffix[place])[:5]
        assert changed == {word for _, word in allowed}
    assert all(sum(a != b for a, b in zip(one, suffix, strict=True)) == 1 for one in tried)


@pytest.mark.parametrize("per_row", [False, True])
def test_the_search_never_rises_and_can_be_repeated(per_row: bool, attacked: Callable[..., Subject]) -> None:
    wanted = GCG(tokens=3, candidates=16, swaps=12, steps=5, every=1, rows=3, per_row=per_row)
    curve = wanted(attacked())
    losses = [curve.notes[f"loss at step {step}"] for step in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-2
    assert curve.x == (0, 1, 2, 3, 4, 5) and len(curve.rows) == (3 if per_row else 9)
    difference = curve.notes["true, after"] - curve.notes["control, after"]
    assert curve.y[-1] == pytest.approx(difference) == pytest.approx(np.mean(curve.rows)) and difference != 0
    assert wanted(attacked()) == curve
    assert np.allclose(wanted(attacked(batch_tokens=90)).y, curve.y, atol=1e-5)
    assert wanted(attacked(seed=6)) != curve


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_the_controls_search_is_the_same_search_for_other_answers(control: Any, attacked: Callable[..., Subject]) -> None:
    """By hand: the search on the rows with the answers that the control gives them; measured where it is searched, the values are
    exp of the negative losses. It finds strings that belong to nothing, as it does the true ones."""
    wanted = GCG(tokens=3, candidates=16, swaps=12, steps=5, every=5, rows=3, per_row=True, control=control)
    subject = attacked()
    curve, loaded, examples = wanted(subject), subject.load(), answers_of(subject, "test", "forget")
    chosen = sorted(np.random.default_rng([5, 21]).permutation(12)[:3].tolist())
    places = ends_of_prompts(loaded, examples, subject.sets["forget"].prompts, Chat())
    by_hand = []
    for asked in (examples, other_answers(subject, "gcg", loaded, examples, [range(12)], control)):
        found = [wanted._search(subject, loaded, asked, places, [i], [i]) for i in chosen]
        for values, losses in found:
            assert np.allclose([float(value[0]) for value in values], np.exp(-np.array(losses)), rtol=1e-5)
        by_hand.append(found)
    assert np.allclose(curve.rows, [true[0][-1][0] - other[0][-1][0] for true, other in zip(*by_hand, strict=True)])
    assert curve.notes["control loss, after"] == pytest.approx(np.mean([other[1][-1] for other in by_hand[1]]))
    assert all(other[1][-1] < other[1][0] - 1e-3 for other in by_hand[1])


def test_a_suffix_for_all_needs_rows_that_it_was_not_searched_on(attacked: Callable[..., Subject]) -> None:
    with pytest.raises(Refused, match="leave none to measure"):
        GCG(rows=12)(attacked())
    with pytest.raises(Refused, match="has no token"):
        searching._first_token(attacked().load(), "")


# -------------------------------------------------------------------------------------------------------------- rewrites


def asked_by(wanted: Rewrites, subject: Subject, kind: Any) -> EncodedSet:
    return wanted._encoded(subject, subject.load(), subject.sets[wanted.set], kind)


def test_as_asked_is_the_set_itself_and_the_best_form_counts(attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=600)
    wanted = Rewrites(max_new_tokens=3)
    found = subject.sets["forget"]
    for one, other in zip(asked_by(wanted, subject, "as_asked").examples, answers_of(subject, "test", "forget"), strict=True):
        assert (one.ids, one.answer) == (other.ids, other.answer)
    curve = wanted(subject)
    own = np.array([np.exp(own_logp(subject.load().model, one)) for one in answers_of(subject, "test", "forget")])
    assert curve.y[0] == pytest.approx(own.mean(), rel=1e-4) and len(curve.y) == len(wanted.kinds) + 1 == 8
    assert np.all(np.array(curve.rows) >= own - 1e-7) and curve.y[-1] >= max(y for i, y in enumerate(curve.y[:-1]) if i != 5)
    assert curve.notes["4 multiple_choice chance"] == 0.25 and 0 <= curve.notes["4 multiple_choice picked"] <= 1
    rouge = replace(wanted, measure="rouge")(subject)
    assert rouge.y[1] == curve.notes["1 role_play rouge"] and curve.y[1] == rouge.notes["1 role_play probability"]
    one = {"forget": asked_by(wanted, subject, "role_play")}
    table = tables_of(subject.load(), one, subject.accelerator, batch_tokens=99, max_new_tokens=3, cache=None)["forget"]
    assert table.prompts[0] == TEMPLATES["role_play"].format(question=found.prompts[0])
    assert np.exp(-table.likelihood.nll / table.likelihood.length).mean() == pytest.approx(curve.y[1], rel=1e-4)


def test_forms_say_what_they_should(attacked: Callable[..., Subject], tokenizer: Any) -> None:
    subject = attacked()
    paraphrase = Source(source="embedded:forget", prompt="paraphrased_question", answer="paraphrased_answer")
    wanted = Rewrites(given={"paraphrase": paraphrase})
    found = subject.sets["forget"]
    shown = asked_by(wanted, subject, "in_context")
    for text, prompt, answer in zip(shown.prompts, found.prompts, found.answers, strict=True):
        assert text.endswith(prompt) and answer not in text and sum(text.count(one) for one in found.answers) == 3
    others = asked_by(replace(wanted, shots_from="retain", shots=2), subject, "in_context")
    assert all(sum(text.count(one) for one in subject.sets["retain"].answers) == 2 for text in others.prompts)
    choices = asked_by(wanted, subject, "multiple_choice")
    for row, text in enumerate(choices.prompts):
        options = [tokenizer.decode(one.ids[one.answer :], skip_special_tokens=True).strip()
                   for one, r in zip(choices.examples, choices.row, strict=True) if r == row]  # fmt: skip
        assert len(options) == len(set(options)) == 4 and all(text.count(option) == 1 for option in options)
        assert options[0] == choices.answers[row]
    places = {text.index(answer) < text.index("(B)") for text, answer in zip(choices.prompts, choices.answers, strict=True)}
    assert places == {True, False}, "the truth does not always stand first"
    plain = replace(subject, sets={"forget": replace(found, **only_answers(found))})
    assert asked_by(wanted, plain, "multiple_choice").answers == found.answers
    backwards = asked_by(wanted, subject, "reverse_query")
    assert backwards.answers == found.prompts and all(a in text for a, text in zip(found.answers, backwards.prompts, strict=True))
    paraphrased = asked_by(wanted, subject, "paraphrase")
    theirs = {row["id"]: row for row in population.rows("forget")}
    assert paraphrased.prompts == [theirs[one]["paraphrased_question"] for one in found.ids]
    assert paraphrased.answers == [theirs[one]["paraphrased_answer"] for one in found.ids] != found.answers
    assert asked_by(wanted, subject, "in_context") == shown


def test_a_file_asks_in_another_language_and_expects_its_own_answers(attacked: Callable[..., Subject], tmp_path: Path) -> None:
    """Each named form is a point of the curve, and counts among the best."""
    subject, path = attacked(), tmp_path / "french.jsonl"
    found = subject.sets["forget"]
    lines = [{"id": one, "question_fr": f"Qui est {i} ?", "answer_fr": f"C'est {i}."} for i, one in enumerate(found.ids)]
    path.write_text("\n".join(json.dumps(line) for line in reversed(lines)))
    french = Source(source=str(path), prompt="question_fr", answer="answer_fr")
    wanted = Rewrites(kinds=("as_asked",), given={"french": french, "german": GERMAN}, max_new_tokens=2)
    asked = {name: asked_by(wanted, subject, name) for name in ("french", "german")}
    assert asked["french"].prompts == [line["question_fr"] for line in lines]
    assert asked["french"].answers == [line["answer_fr"] for line in lines]
    assert asked["german"].answers == found.answers and asked["german"].prompts != found.prompts
    curve = wanted(subject)
    assert wanted.x.ticks == ("as_asked", "french", "german", "best of all") and len(curve.y) == 4
    own = {name: [np.exp(own_logp(subject.load().model, one)) for one in given.examples] for name, given in asked.items()}
    assert np.allclose(curve.y[1:3], [np.mean(rows) for rows in own.values()], rtol=1e-4)
    assert curve.notes["1 french probability"] == curve.y[1]
    first = [np.exp(own_logp(subject.load().model, one)) for one in answers_of(subject, "test", "forget")]
    assert np.allclose(curve.rows, np.max([first, *own.values()], axis=0), rtol=1e-4)


def test_forms_that_cannot_be_made_say_so(attacked: Callable[..., Subject], make_model: Callable[..., Any]) -> None:
    subject = attacked(make_model(max_position_embeddings=64))
    with pytest.raises(Refused, match="longer than the 64 tokens"):
        asked_by(Rewrites(), subject, "in_context")
    for source, said in ((Source(source="embedded:retain", prompt="question", answer="answer"), "is not in given.french"),
                         (Source(source="embedded:forget", text="answer"), "running text")):  # fmt: skip
        with pytest.raises(Refused, match=said):
            asked_by(Rewrites(given={"french": source}), subject, "french")
    one = encode_set("forget", replace(SOURCE, limit=1), ("answer",), subject.load().tokenizer)
    with pytest.raises(Refused, match="no second answer"):
        asked_by(Rewrites(), replace(subject, sets={"forget": one}), "multiple_choice")
    text = replace(subject.sets["forget"], prompts=[""] * 12)
    with pytest.raises(Refused, match="running text"):
        Rewrites()(replace(subject, sets={"forget": text}))


@pytest.mark.parametrize(
    "attack",
    [
        LogitLens(),
        LayerProbe(),
        ActivationPatching(),
        SoftPrompt(tokens=2, steps=2, every=1),
        GCG(tokens=2, candidates=8, swaps=4, steps=1, every=1, rows=2),
        Rewrites(kinds=("as_asked", "multiple_choice"), max_new_tokens=2),
        TwoModel(),
    ],
    ids=lambda attack: attack.name,
)
def test_attacks_compute_in_bf16_and_the_model_stays_as_it_is(attack: Any, attacked: Callable[..., Subject]) -> None:
    """Within bf16's rounding of the same in float32, and every weight as before."""
    exact = attacked()
    net = exact.load().model
    whole = attack(replace(exact, original=exact.load))
    rough = replace(exact, original=exact.load, accelerator=FakeAccelerator())  # type: ignore[arg-type]
    net.bfloat16()
    before = [weight.clone() for weight in net.parameters()]
    found = attack(rough)
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
    assert found.x == whole.x and np.isfinite(found.y).all()
    if not isinstance(attack, LayerProbe):  # whose rows are right or wrong
        assert np.allclose(found.y, whole.y, atol=5e-3)


class FakeAccelerator:
    """An accelerator that computes in bf16; a second real one in a process must be like the first."""

    device = torch.device("cpu")
    mixed_precision = "bf16"
    is_main_process = True
    num_processes, process_index = 1, 0

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return value

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------ two models


def own_next(net: Any, ids: list[int]) -> torch.Tensor:
    """(V,) float64 log p of the next token, by the model's own forward pass on one row."""
    with torch.no_grad():
        logp: torch.Tensor = net(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return logp


def by_hand(before: Any, after: Any, prompt: list[int], scale: float, floor: float, most: int) -> list[int]:
    """Equations 3 to 5 of 2505.24379, token by token: log p' + w (log p − log p') over the tokens with p ≥ γ max p."""
    ids = list(prompt)
    for _ in range(most):
        p, other = own_next(before, ids), own_next(after, ids)
        q = other + scale * (p - other)
        ids.append(int(torch.where(p.exp() >= floor * p.exp().max(), q, -torch.inf).argmax()))
        if ids[-1] == 3:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(("scale", "floor"), [(2.0, 1e-5), (2.0, 0.3), (0.0, 0.0), (-1.0, 0.1)])
def test_two_models_write_what_the_equations_say(scale: float, floor: float, attacked: Callable[..., Subject]) -> None:
    subject = attacked(batch_tokens=300)
    before, after = subject.load(), attacked(other_inside(subject.load().model, 1)).load()
    asked = replace(asked_of(subject.sets["forget"]), needs=frozenset({"answer", "generation"}))
    assert len({one.answer for one in asked.examples}) > 3, "prompts of different length, so that there is padding"
    show = Bar("asked", len(asked.ids), "answer", quiet=True)
    found = generation_pass(before, asked, subject.accelerator, 300, 5, show, Guide(after, scale, floor))
    alone = generation_pass(before, asked, subject.accelerator, 300, 5, show)
    expected = [by_hand(before.model, after.model, [*one.ids[: one.answer]], scale, floor, 5) for one in asked.examples]
    assert found == [before.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected] != alone
    if scale == floor == 0:
        assert found == generation_pass(after, asked, subject.accelerator, 300, 5, show)
    nothing = Guide(after, 1.0, floor)
    assert alone == generation_pass(before, asked, subject.accelerator, 300, 5, show, nothing)


def test_what_two_models_give_is_read_off_the_rest_of_each_answer(
    attacked: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker has half of the tokens; exact, near and ROUGE-L of made-up texts by hand; 1 is the model before alone."""
    net = attacked().load().model
    subject = attacked(other_inside(net, 1), net)
    examples, tokenizer = answers_of(subject, "test", "forget"), subject.load().tokenizer
    rest = [tokenizer.decode(one.ids[one.answer + one.targets // 2 :], skip_special_tokens=True).strip() for one in examples]
    said: list[tuple[float | None, Any]] = []
    longest = max(range(2, 12), key=lambda row: len(rest[row].split()))

    def written(loaded: Loaded, asked: EncodedSet, *more: Any) -> list[str]:
        assert (
            loaded.model is net and [one.ids for one in asked.examples] == [one.ids for one in examples] and asked.answers == rest
        )
        assert [one.answer for one in asked.asked] == [one.answer + one.targets // 2 for one in examples]
        guide = more[-1]
        said.append((guide.scale, guide.floor) if guide else (None, None))
        if guide is None:
            return ["?"] * 12
        texts = [rest[0] + " and more", f"  {rest[1]}", *["?"] * 10]
        texts[longest] = " ".join(rest[longest].split()[:-1])
        return texts

    monkeypatch.setattr(answering, "generation_pass", written)
    curve = TwoModel(near=0.6)(subject)
    assert said == [(None, None), (1.4, 1e-5), (2.0, 1e-5)] and curve.x == (1.0, 1.4, 2.0)
    words = len(re.findall("[a-z0-9]+", rest[longest].lower()))
    assert words > 2 and curve.y == (0, 3 / 12, 3 / 12) and curve.notes["w 2 exact"] == 2 / 12
    assert curve.notes["w 2 rouge"] == pytest.approx((2 + (words - 1) / words) / 12)
    with pytest.raises(Refused, match="nothing is left"):
        bare = [replace(one, ids=(*one.ids[: one.answer], one.ids[-1])) for one in examples]
        TwoModel()(replace(subject, sets={"forget": replace(asked_of(subject.sets["forget"]), examples=bare)}))


def test_two_models_that_are_one_have_no_difference(attacked: Callable[..., Subject], make_model: Callable[..., Any]) -> None:
    net = attacked().load().model
    curve = TwoModel(scales=(3.0,), measure="rouge")(attacked(net, net))
    assert curve.y[0] == curve.y[1]
    with pytest.raises(Refused, match="before unlearning"):
        TwoModel()(attacked(net))
    with pytest.raises(Refused, match="vocabularies"):
        TwoModel()(attacked(net, make_model(vocabulary=1056)))
    for wrong in ((), (1.0,), (0.5, 2.0), (2.0, 2.0)):
        with pytest.raises(ValidationError):
            TwoModel(scales=wrong)


# ------------------------------------------------------------------------------------------------------- many processes

PROCESSES = {
    "lens": LogitLens(),
    "probe": LayerProbe(),
    "patching": ActivationPatching(),
    "soft": SoftPrompt(tokens=3, steps=6, every=3, step=5e-3),
    "soft per row": SoftPrompt(tokens=3, steps=6, every=3, step=5e-3, per_row=True),
    "gcg": GCG(tokens=3, candidates=16, swaps=12, steps=4, every=2, rows=4),
    "two models": TwoModel(measure="rouge", scales=(2.0,)),
    "gcg per row": GCG(tokens=3, candidates=16, swaps=12, steps=4, every=2, rows=3, per_row=True),
}


def found_by(make_model: Callable[..., Any], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """What each attack finds in a random model, as plain data; batches are small, so that every process has several."""
    net = make_model(num_hidden_layers=3)
    subject = make_subject(make_sets(tokenizer), tokenizer, net, other_inside(net, 1), batch_tokens=120)
    return {name: asdict(attack(subject)) for name, attack in PROCESSES.items()}


@pytest.mark.slow
@pytest.mark.two_processes("whitebox")
def test_two_processes_find_what_one_does(make_model: Callable[..., Any], tokenizer: Any, two_processes: Path) -> None:
    """And each of them has all of it, though it has read half of the rows."""
    one = found_by(make_model, tokenizer)
    mine, theirs = (json.loads((two_processes / f"{rank}.json").read_text()) for rank in (0, 1))
    assert mine["found"] == theirs["found"]
    assert 0 < mine["read"] < 0.6 * (mine["read"] + theirs["read"]) and theirs["read"] > 0
    for name, curve in one.items():
        other = mine["found"][name]
        assert other["notes"].keys() == curve["notes"].keys() and len(curve["rows"]) > 2
        for part in ("x", "y", "low", "high", "rows"):
            np.testing.assert_allclose(other[part], curve[part], atol=1e-4, err_msg=f"{name}: {part}")
        for note, value in curve["notes"].items():
            assert other["notes"][note] == pytest.approx(value, abs=1e-4), f"{name}: {note}"


# ------------------------------------------------------------------------------------------------ the embedded models


@pytest.mark.long
@pytest.mark.slow
def test_what_the_target_knows_and_the_retrained_model_does_not(embedded: dict[str, Path]) -> None:
    """Every attack finds more in the model that saw the data than in the one that did not; the controls find nothing in either."""
    accelerator = Accelerator(cpu=True)
    whole = replace(SOURCE, limit=None)
    sources = {"forget": whole, "retain": replace(whole, source="embedded:retain"), "german": replace(GERMAN, limit=40)}
    found: dict[str, dict[str, Curve]] = {}
    for name in ("target", "retrained"):
        model = Model(base=str(embedded[name]))
        tokenizer = read_tokenizer(model)

        def loader(folder: str) -> Any:
            return lambda *, quantize=None, merged=False, adapter=True: load(Model(base=folder), accelerator.device)

        sets = {
            key: encode_set(key, source, NEEDS if source.perturbed else ("answer",), tokenizer) for key, source in sources.items()
        }
        mine, original = (loader(str(embedded[one])) for one in (name, "target"))
        subject = Subject(name, model, None, mine, sets, original, accelerator, 8192, 0, lambda text: None)
        facts = tuple(replace(whole, source=f"embedded:{one}", answer="fact") for one in ("forget", "retain"))
        found[name] = {
            "lens": LogitLens()(subject),
            "probe": LayerProbe(labels=facts, trained_on="retain")(subject),
            "patching": ActivationPatching()(subject),
            "soft": SoftPrompt(steps=20, every=20)(subject),
            "soft per row": SoftPrompt(steps=60, every=60, per_row=True)(subject),
            "gcg": GCG(steps=2, swaps=16, rows=2, every=2)(subject),
            "rewrites": Rewrites(kinds=("as_asked", "role_play"), max_new_tokens=40, measure="rouge")(subject),
            "two": TwoModel(set="german", scales=(2.0,), measure="rouge")(subject),
        }
    knows, control = found["target"], found["retrained"]
    for attack in ("lens", "soft", "gcg", "rewrites"):
        assert knows[attack].y[-1] > control[attack].y[-1] + 0.05, attack
    assert knows["lens"].y[-1] > 0.98 and np.all(np.diff(knows["lens"].y) > 0)
    assert knows["patching"].y == (0.0,) * 4 and min(control["patching"].y) > 0.1
    # with itself the model before has no difference; one that was trained apart differs by more than what it never saw
    assert knows["two"].y[0] == knows["two"].y[1] == control["two"].y[0] > control["two"].y[1]
    for one in (knows, control):  # which kind of fact is asked for is no secret: a probe that works finds it in both
        assert one["probe"].notes["chance"] == 0.2 and max(one["probe"].y) > 0.8
        assert one["soft"].notes["control, after"] < 0.2  # other rows' answers do not come out of a prompt that never saw them
        assert one["soft per row"].notes["control, after"] > 0.5  # but any string comes out of any model (2502.15836)
        assert abs(one["soft per row"].y[-1]) < 0.6
