"""A recipe: one YAML file = one run, as a frozen typed tree, checked before torch or transformers are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from pathlib import Path

from llm_unlearn.base_names import base_problems
from llm_unlearn.chat import DATE, Chat, chat_problems
from llm_unlearn.methods.noisy_finetune import NoisyFinetune
from llm_unlearn.methods.registry import AnyMethod
from llm_unlearn.methods.retrain import Retrain
from llm_unlearn.objectives.terms import Ramp, Term, layers_read, set_of, stream_of, thought_problems
from llm_unlearn.objectives.views import ROUTERS, WHOLE, beside
from llm_unlearn.sections import Data, Evaluation, Model, Track, Train, missing_tracker, quantized_problems
from llm_unlearn.source import Source, missing, source_problems, unnameable, with_chat
from llm_unlearn.spec import (
    NaturalInt,
    Refused,
    dotted,
    fingerprint,
    nearest,
    plain,
    readable,
    spec,
)
from llm_unlearn.training.gradients import AnyRule, Bilevel, Latent, Orthogonal, Project, Saliency, TrustRegion
from llm_unlearn.tree import Tree, build, is_file, locate, no_such_file, read_tree


@spec
class Recipe:
    """One run: a model, what it forgets and keeps, by which losses, how, and how the result is measured."""

    seed: NaturalInt = 0
    """Every random draw of the run follows from it."""
    output: str
    """The run folder."""
    model: Model
    data: Data
    chat: Chat = Chat(date=DATE)
    """Settings of the chat template: system turn, thinking, date, template arguments; a source may say otherwise."""
    objective: Mapping[str, Term] = field(default_factory=dict)
    """Terms of the total loss, each on the stream it is named after (or on its `stream`)."""
    method: AnyMethod | None = None
    """A way to forget that is not one loss on the whole model, instead of an objective."""
    train: Train = Train()
    evaluation: Evaluation | None = None
    """A suite file, or {suite, retrained, every}."""
    track: Track | None = None
    """Experiment trackers: one name, several, or {to, project, name, every}."""

    @property
    def sources(self) -> dict[str, Source]:
        """Stream name -> where its rows come from."""
        return {"forget": self.data.forget} | self.data.kept

    @property
    def terms(self) -> Mapping[str, Term]:
        """What is trained: the objective, or what the method stands for."""
        return self.method.terms if self.method else self.objective

    @property
    def drawn_openly(self) -> bool | None:
        """Whether noise is drawn from the seed, not from a secret; None where there is no noise."""
        wanted = self.train.privacy or (self.method if isinstance(self.method, NoisyFinetune) else None)
        return wanted.reproducible if wanted else None

    @property
    def window(self) -> dict[str, int]:
        """Examples of each stream in one optimizer step; the first, of an objective the forget stream, sets the length of an epoch.
        A method's streams are those of its terms: retraining passes over the retain set and never looks at the other."""
        return {name: self.train.window.get(name, 16) for name in (self.method.terms if self.method else self.sources)}

    @property
    def hash(self) -> str:
        """Stands for everything that decides the outcome: all but the name of the run folder, and who is told of it."""
        return fingerprint({key: value for key, value in plain(self).items() if key not in ("output", "track")})


def load(path: Path, overrides: Iterable[str] = (), check: bool = True) -> Recipe:
    """Read and check a recipe. Never executes it, and imports nothing heavy.

    Args:
        check: also look whether its parts fit together and its files are there; types are always checked.

    Raises:
        Refused: every wrong key at once, each with its place, what was found and what was expected.
    """
    return checked(read_tree(path, overrides), check)


def checked(tree: Tree, check: bool = True) -> Recipe:
    """The recipe that a tree is.

    Raises:
        Refused: as for a file.
    """
    if isinstance(tree.data.get("evaluation"), str):
        tree.data["evaluation"] = {"suite": tree.data["evaluation"]}
    if isinstance(track := tree.data.get("track"), (str, list)):
        tree.data["track"] = track = {"to": track}
    if isinstance(track, dict) and isinstance(track.get("to"), str):
        track["to"] = [track["to"]]
    if isinstance(objective := tree.data.get("objective"), dict):  # `retain: null` takes a term out
        tree.data["objective"] = {name: term for name, term in objective.items() if term is not None}
    elif objective is None:  # and `objective: null` all of them, for a method in their place
        tree.data.pop("objective", None)
    recipe = build(Recipe, tree)
    recipe = replace(recipe, chat=recipe.chat.over(Chat()), data=with_chat(recipe.data, recipe.chat))
    problems = list(_problems(recipe, tree)) if check else []
    if problems:
        raise Refused("\n".join(problems))
    return recipe


def _problems(recipe: Recipe, tree: Tree) -> Iterable[str]:
    """What no single type can say: how the parts of a recipe must fit together."""

    def say(text: str, *path: str) -> str:
        return readable(f"{tree.place(path)}: {dotted(path)}: {text}")

    if not recipe.output.strip() or unnameable(recipe.output):
        yield say("no folder can have this name; expected one such as runs/first.", "output")
    wrong = list(chat_problems(recipe.chat))
    yield from (say(text, "chat", *keys) for keys, text in wrong)
    yield from _model_problems(recipe, say)
    yield from _speed_problems(recipe, say)
    yield from _stop_problems(recipe, say)
    yield from _rule_problems(recipe, say)
    yield from _privacy_problems(recipe, say)
    for name in recipe.train.window.keys() - recipe.sources.keys():
        yield say(f"no such stream; {nearest(name, recipe.sources)}", "train", "window", name)
    if recipe.evaluation and not is_file(path := locate(recipe.evaluation.suite, Path(tree.file))):
        yield say(no_such_file(path), "evaluation", "suite")
    if recipe.track and (lacking := missing_tracker(recipe.track)):
        yield say(lacking, "track", "to")
    for name in recipe.data.streams or ():
        if name in ("forget", "retain", "holdout") or not name.isidentifier():
            yield say("must be a name of letters, digits and _, and not forget, retain or holdout.", "data", "streams", name)
    looked_at = {"holdout": recipe.data.holdout} if recipe.data.holdout else {}
    for name, source in {**recipe.sources, **looked_at}.items():
        inside = ("streams", name) if name in (recipe.data.streams or {}) else (name,)
        found = ((where, text) for where, text in source_problems(source) if (where[1:], text) not in wrong)
        yield from (say(text, "data", *inside, *where) for where, text in found)
    yield from _method_problems(recipe, say) if recipe.method else _objective_problems(recipe, say)
    separate = {name for name, source in recipe.sources.items() if source.targets == "separate"}
    yield from (say(text, *at) for text, *at in thought_problems(recipe.terms, recipe.sources, separate))


def _model_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """What is trained must be there, and be able to be trained."""
    if recipe.model.quantize:
        yield from (say(text, *keys) for keys, text in quantized_problems(recipe.model, recipe.train, "model.quantize: null"))
    if recipe.model.trainable and recipe.model.adapter:
        yield say(
            "names full weights, and an adapter is trained; give model.adapter: null, or model.adapter.targets.",
            "model",
            "trainable",
        )
    if recipe.train.reference == "adapter_off" and not recipe.model.adapter:
        yield say("no adapter is trained that could be switched off; give kept or copy, or leave it out.", "train", "reference")
    if recipe.model.adapter and recipe.model.adapter.init == "fila":
        at = ("model", "adapter", "init")
        if not recipe.data.retain:
            yield say("weighs the forget against the retain set, and there is none; give data.retain.", *at)
    yield from (say(text, "model", "base") for text in base_problems(recipe.model.base))
    for start in filter(missing, recipe.model.starts):
        yield say(f"no such folder: {start} (looked from {Path.cwd()}).", "model", "start")
    if recipe.model.chat_template and not is_file(Path(recipe.model.chat_template)):
        yield say(f"no such file: {recipe.model.chat_template} (looked from {Path.cwd()}).", "model", "chat_template")


def _speed_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """What computes the same in another way must go together."""
    at = ("train", "compile")
    if recipe.train.compile and recipe.model.kernels:
        yield say("layers with kernels of their own are not compiled; give compile: null, or model.kernels: null.", *at)
    if recipe.train.compile and any(ROUTERS in layers_read(term.loss) for term in recipe.objective.values()):
        yield say("router logits cannot be read inside compiled layers. Set compile: null.", *at)


def _stop_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """What the dose is measured on must be there."""
    stop = recipe.train.stop
    if not stop:
        return
    if not recipe.data.retain and (stop.budget.retain_accuracy is not None or stop.budget.retain_perplexity is not None):
        text = "looks at the retain set, and there is none; give data.retain, or budget: {retain_perplexity: null}."
        yield say(text, "train", "stop")
    if stop.until == "holdout" and not recipe.data.holdout:
        yield say("compares with the holdout set, and there is none; give data.holdout.", "train", "stop", "until")
    if stop.until == "retrained" and not recipe.evaluation:
        text = "compares with the retrained model, and none is named; give evaluation: {suite: …, retrained: …}."
        yield say(text, "train", "stop", "until")


def _rule_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """A rule must find what it works on, and no two may do the same thing."""
    names = [rule.name for rule in recipe.train.rules]
    for i, rule in enumerate(recipe.train.rules):
        if rule.name in names[:i]:
            yield say(f"{rule.name} stands twice; a rule acts once.", "train", "rules", i)
        yield from (say(text, "train", "rules", i, *where) for text, *where in _unable(rule, recipe))
    if {"project", "bilevel"} <= set(names):
        yield say("project and bilevel are two ways to make one gradient of two; keep one of them.", "train", "rules")


def _unable(rule: AnyRule, recipe: Recipe) -> Iterable[tuple[str | int, ...]]:
    """Why a rule cannot act, and the key below it where there is one."""
    streams = {set_of(term, name) for name, term in recipe.objective.items()}
    if isinstance(rule, (Project, Bilevel, Saliency)) and "retain" not in streams:
        yield (f"{rule.name} weighs the forget against the retain terms, and there are none; give objective.retain.",)
    match rule:
        case Latent():
            forget = [term.loss for name, term in recipe.objective.items() if set_of(term, name) == "forget"]
            read = [layer for loss in forget for layer in layers_read(loss)]
            if read and WHOLE.isdisjoint(read) and rule.layer > max(read):
                yield f"disturbs layer {rule.layer}, and the forget terms read no deeper than layer {max(read)}.", "layer"
        case Saliency() if recipe.train.weight_decay:
            yield ("decay would move the weights that saliency holds still; give train.weight_decay: 0.",)
        case TrustRegion(kl=None, distance=None):
            yield ("has no bound; give distance or kl.",)
        case TrustRegion() if rule.kl is not None and not recipe.data.retain:
            yield "kl is measured on the retain set, and there is none; give data.retain.", "kl"
        case Orthogonal():
            if not recipe.model.adapter:
                yield ("compares adapters, and full weights are trained; give model.adapter.",)
            for k, folder in enumerate(rule.adapters):
                if missing(folder):
                    yield f"no such folder: {folder} (looked from {Path.cwd()}).", "adapters", k


def _privacy_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """Where the guarantee would not hold, it is not given."""
    privacy, train = recipe.train.privacy, recipe.train
    if not privacy:
        return
    if (privacy.epsilon is None) == (privacy.noise is None):
        yield say("give epsilon, and the noise is found from it, or noise, and epsilon follows.", "train", "privacy")
    if recipe.method and not isinstance(recipe.method, (Retrain, NoisyFinetune)):  # the latter says more of it itself
        text = f"{recipe.method.name} moves weights outside of private steps, without noise; take out one of the two."
        yield say(text, "train", "privacy")
    for name, text in (
        ("rules", "a rule reads gradients without noise, which privacy does not cover; give rules: []."),
        ("offload", "gradients of single rows are read where layers are called; give offload: null."),
        ("compile", "gradients of single rows are read where layers are called; give compile: null."),
        ("stop", "where a run ends would tell of the rows it looks at; give stop: null, and steps or epochs."),
    ):
        if getattr(train, name):
            yield say(text, "train", name)
    if recipe.data.overlap == "drop":
        yield say("a row that leaves because of another tells of that one; give overlap: error.", "data", "overlap")
    if recipe.model.adapter and recipe.model.adapter.init == "fila":
        yield say("begins from statistics of the rows, without noise; give init: zero.", "model", "adapter", "init")
    for name, term in recipe.terms.items():
        at, needs = ("objective", name), term.loss.needs
        if term.budget:
            yield say("its weight would follow from true means of the loss; give a weight without budget.", *at, "budget")
        if needs.reads != ("answer",) or needs.contrasts or needs.window or "." in stream_of(term, name):
            text = f"{term.loss.name} reads more than the row itself, so no gradient belongs to one row; take nll or npo."
            yield say(text, *at, "loss")


def _method_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """A method must find its sets, and stands in the place of an objective."""
    assert recipe.method
    if recipe.objective:
        yield say(f"{recipe.method.name} brings its own; take out one of the two.", "objective")
    for name in recipe.method.terms:
        if name not in recipe.sources:
            yield say(f"missing; {recipe.method.name} reads it.", "data", name)
    for text, *path in recipe.method.problems(recipe.model, recipe.train, recipe.evaluation):
        yield say(text, *path)


def _objective_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """Every term must find its stream, and every stream its loss."""
    if not recipe.objective:
        yield say("missing; it has no terms, such as forget: {loss: {name: npo}}. (Or give a method.)", "objective")
    streams = {name: stream_of(term, name) for name, term in recipe.objective.items()}
    thoughts = [beside(name, "thought") for name in recipe.sources]
    for name, stream in streams.items():
        if stream not in {*recipe.sources, *thoughts}:
            at = ("stream",) if recipe.objective[name].stream else ()
            text = f"reads stream {stream!r}, which data does not have; {nearest(stream, [*recipe.sources, *thoughts])}"
            yield say(text, "objective", name, *at)
    fila = recipe.model.adapter is not None and recipe.model.adapter.init == "fila"
    looked_at = {"retain"} if recipe.train.stop or recipe.train.rules or fila else set()
    for name, source in recipe.sources.items():
        if name not in {*streams.values(), *looked_at}:
            text = f"no loss reads this stream; add objective.{name}, such as {{loss: {{name: nll}}}}, or take it out."
            yield say(text, "data", name)
        mine = [term.loss for key, term in recipe.objective.items() if streams[key] == name]
        for part, given, kinds, such_as in (
            ("alternate", source.alternate, {"alternate"}, "{source: embedded:refusals, answer: text}"),
            ("contrast", source.contrast, {"expert", "novice"}, "{expert: You are an expert in …, novice: You know nothing of …}"),
        ):
            readers = [loss.name for loss in mine if kinds & {*loss.needs.reads, *loss.needs.contrasts}]
            if readers and not given:
                yield say(f"missing; loss {readers[0]!r} reads it, such as {such_as}.", "data", name, part)
            if given and not readers:
                likely = "dpo or idk" if part == "alternate" else "elm"
                yield say(f"no loss reads it; take it out, or use a loss such as {likely}.", "data", name, part)
    for name, term in recipe.objective.items():
        if term.budget and isinstance(term.weight, Ramp):
            yield say("a budget finds the weight itself; give its first value as one number.", "objective", name, "weight")
