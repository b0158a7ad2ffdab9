"""A recipe: one YAML file = one run, as a frozen typed tree, checked before torch or transformers are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

from llm_unlearn.embedded.population import SPLITS
from llm_unlearn.objectives.terms import Term
from llm_unlearn.spec import (
    AtLeastTwo,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Refused,
    Share,
    dotted,
    fingerprint,
    nearest,
    plain,
    spec,
)
from llm_unlearn.tree import Tree, build, locate, no_such_file, read_tree


@spec
class Adapter:
    """A LoRA adapter (Hu et al. 2021, 2106.09685) that is trained instead of the weights."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rank r of the update B·A."""
    alpha: PositiveFloat = 32
    """Scale: the update counts alpha / rank times."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get one, or all-linear (every linear layer but the output head)."""


@spec
class Model:
    """The model that is to forget."""

    base: str
    """A hub id, a folder that `save_pretrained` wrote, or embedded:target."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    start: str | None = None
    """An adapter that belongs to the model as it is now (the fine-tuning to be unlearned); it is merged before anything else."""
    adapter: Adapter | None = Adapter()
    """The adapter to train; null trains the full weights."""
    quantize: Literal["nf4", "int8"] | None = None
    """Load the frozen base in 4 or 8 bits (QLoRA, 2305.14314); needs an adapter and bitsandbytes."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the accelerator computes in it, fp32 elsewhere."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template; without either, a plain question–answer layout is used."""


@spec
class Alternate:
    """Another answer to the same prompts, for losses that teach one (idk, dpo)."""

    answer: str
    """Column that holds it. A column of lists gives one of the list per epoch."""
    source: str | None = None
    """Where the column is read, such as embedded:refusals; each prompt gets one row, drawn from the seed. Without it: here."""


@spec
class Source:
    """Rows, and which columns of them make an example: prompt + answer, messages, or text."""

    source: str
    """A hub id, a local json / jsonl / csv / parquet / txt file or folder, or embedded:forget | retain | holdout | general."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set; without it, train."""
    prompt: str | None = None
    """Column of the question."""
    answer: str | None = None
    """Column of the answer: what is forgotten or kept."""
    messages: str | None = None
    """Column of a chat, a list of {role, content}; the last assistant turn is the answer."""
    text: str | None = None
    """Column of running text, cut into blocks of `max_tokens`; every token is a target."""
    where: Mapping[str, str | int | float | bool | tuple[str | int | float | bool, ...]] | None = None
    """Keep the rows whose column equals the value, or is one of the values."""
    limit: PositiveInt | None = None
    """Keep the first so many rows."""
    max_tokens: AtLeastTwo = 1024
    """Longer examples are cut here."""
    alternate: Alternate | None = None
    """Another answer to the same prompts, for losses that teach one."""
    paraphrase: str | None = None
    """Column of the answer in other words (evaluation only)."""
    perturbed: str | None = None
    """Column of wrong answers, a list per row (evaluation only)."""


@spec
class Data:
    """What is to be forgotten and what is to be kept."""

    forget: Source
    retain: Source | None = None
    overlap: Literal["error", "drop"] = "error"
    """Rows that stand in both: refuse the run, or let them leave the retain set."""


@spec
class Stop:
    """Side effects that end a run. The last weights that were within the bound are the ones kept."""

    retain_perplexity: PositiveFloat = 1.5
    """The run ends when perplexity on the probe is above so many times its value before the run."""
    every: PositiveInt = 10
    """Optimizer steps between two looks at the probe."""
    rows: PositiveInt = 32
    """Rows of the retain set in the probe, drawn from the seed."""


@spec
class Train:
    """How the weights are moved."""

    epochs: PositiveFloat = 5
    """Passes over the forget set; the retain set goes along, window by window."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    window: Mapping[str, PositiveInt] = field(default_factory=dict)
    """Examples of each stream in one optimizer step, over all processes; 16 of a stream that is not named."""
    batch_tokens: PositiveInt = 8192
    """At most so many tokens, padding included, in one forward pass per process. Sets speed and memory, never the result."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The 8-bit ones keep their states in 8 bits, the paged one moves them to the CPU when memory is short; both need CUDA."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of matrices; norms and biases do not decay."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    clip: PositiveFloat | None = 1.0
    """Largest global norm of the gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    checkpoint_every: PositiveInt = 50
    """Optimizer steps between two checkpoints, from which `--resume` goes on."""
    stop: Stop | None = None
    """A bound on side effects."""


@spec
class Evaluation:
    """Which suite tells what is left."""

    suite: str
    """A suite file, such as eval/quick.yaml."""
    retrained: str | None = None
    """The model that never saw the forget set; without it, the one that the suite names."""
    every: PositiveInt | None = None
    """Also run the suite every so many optimizer steps."""


@spec
class Recipe:
    """One run: a model, what it forgets and keeps, by which losses, how, and how the result is measured."""

    seed: NaturalInt = 0
    """Every random draw of the run follows from it."""
    output: str
    """The run folder."""
    model: Model
    data: Data
    objective: Mapping[str, Term]
    """Terms of the total loss, each on the stream it is named after (or on its `stream`)."""
    train: Train = Train()
    evaluation: Evaluation | None = None
    """A suite file, or {suite, retrained, every}."""

    @property
    def sources(self) -> dict[str, Source]:
        """Stream name -> where its rows come from."""
        return {"forget": self.data.forget} | ({"retain": self.data.retain} if self.data.retain else {})

    @property
    def window(self) -> dict[str, int]:
        """Examples of each stream in one optimizer step; the forget stream, first, sets the length of an epoch."""
        return {name: self.train.window.get(name, 16) for name in self.sources}

    @property
    def hash(self) -> str:
        """Stands for everything that decides the outcome: all but the name of the run folder."""
        return fingerprint({key: value for key, value in plain(self).items() if key != "output"})


def load(path: Path, overrides: Iterable[str] = (), check: bool = True) -> Recipe:
    """Read and check a recipe. Never executes it, and imports nothing heavy.

    Args:
        check: also look whether its parts fit together and its files are there; types are always checked.

    Raises:
        Refused: every wrong key at once, each with its place, what was found and what was expected.
    """
    tree = read_tree(path, overrides)
    if isinstance(tree.data.get("evaluation"), str):
        tree.data["evaluation"] = {"suite": tree.data["evaluation"]}
    if isinstance(objective := tree.data.get("objective"), dict):  # `retain: null` takes a term out
        tree.data["objective"] = {name: term for name, term in objective.items() if term is not None}
    recipe = build(Recipe, tree)
    problems = list(_problems(recipe, tree)) if check else []
    if problems:
        raise Refused("\n".join(problems))
    return recipe


def _problems(recipe: Recipe, tree: Tree) -> Iterable[str]:
    """What no single type can say: how the parts of a recipe must fit together."""

    def say(text: str, *path: str) -> str:
        return f"{tree.place(path)}: {dotted(path)}: {text}"

    if recipe.model.quantize and not recipe.model.adapter:
        yield say("quantized weights cannot be trained; give model.adapter, or quantize: null.", "model", "quantize")
    if recipe.train.stop and not recipe.data.retain:
        yield say("looks at the retain set, and there is none; give data.retain.", "train", "stop")
    for name in recipe.train.window.keys() - recipe.sources.keys():
        yield say(f"no such stream; {nearest(name, recipe.sources)}", "train", "window", name)
    if recipe.model.base.startswith("embedded:") and recipe.model.base not in ("embedded:target", "embedded:retrained"):
        yield say(f"found {recipe.model.base!r}; expected embedded:target, a folder or a hub id.", "model", "base")
    if missing(recipe.model.base):
        yield say(f"no such folder: {recipe.model.base} (looked from {Path.cwd()}).", "model", "base")
    if recipe.model.start and missing(recipe.model.start):
        yield say(f"no such folder: {recipe.model.start} (looked from {Path.cwd()}).", "model", "start")
    if recipe.model.chat_template and not Path(recipe.model.chat_template).is_file():
        yield say(f"no such file: {recipe.model.chat_template} (looked from {Path.cwd()}).", "model", "chat_template")
    if recipe.evaluation and not (path := locate(recipe.evaluation.suite, Path(tree.file))).is_file():
        yield say(no_such_file(path), "evaluation", "suite")
    for name, source in recipe.sources.items():
        yield from (say(text, "data", name, *where) for where, text in source_problems(source))
    yield from _objective_problems(recipe, say)


def _objective_problems(recipe: Recipe, say: Callable[..., str]) -> Iterable[str]:
    """Every term must find its stream, and every stream its loss."""
    if not recipe.objective:
        yield say("has no terms; expected such as forget: {loss: {name: npo}}.", "objective")
    streams = {name: term.stream or name for name, term in recipe.objective.items()}
    for name, stream in streams.items():
        if stream not in recipe.sources:
            at = ("stream",) if recipe.objective[name].stream else ()
            yield say(
                f"reads stream {stream!r}, which data does not have; {nearest(stream, recipe.sources)}",
                "objective",
                name,
                *at,
            )
    for name, source in recipe.sources.items():
        if name not in streams.values():
            yield say(
                f"no loss reads this stream; add objective.{name}, such as {{loss: {{name: nll}}}}, or take it out.",
                "data",
                name,
            )
        losses = [
            term.loss.name for key, term in recipe.objective.items() if streams[key] == name and "alternate" in term.loss.reads
        ]
        if losses and not source.alternate:
            text = f"missing; loss {losses[0]!r} reads an alternate answer, such as {{source: embedded:refusals, answer: text}}."
            yield say(text, "data", name, "alternate")
        if source.alternate and not losses:
            yield say("no loss reads it; take it out, or use a loss such as dpo or idk.", "data", name, "alternate")
    if sum(source.alternate is not None for source in recipe.sources.values()) > 1:
        yield say("both streams have one; one stream only can have alternate answers.", "data", "retain", "alternate")


def source_problems(source: Source) -> Iterable[tuple[tuple[str, ...], str]]:
    """What is wrong with one source: its columns, or a file that is not there. Yields (keys below the source, text)."""
    shapes = [bool(source.prompt or source.answer), bool(source.messages), bool(source.text)]
    if sum(shapes) != 1:
        yield (), "expected one of: prompt and answer (columns), messages (a chat column), text (a column of running text)."
    elif shapes[0] and not (source.prompt and source.answer):
        yield (
            (),
            f"found {'prompt' if source.prompt else 'answer'} alone; expected both prompt and answer, the names of two columns.",
        )
    if source.text and source.alternate:
        yield ("alternate",), "running text has no prompt that could have another answer; take it out, or name prompt and answer."
    for path, name in (
        (("source",), source.source),
        (("alternate", "source"), source.alternate.source if source.alternate else None),
    ):
        if name is None:
            continue
        if name.startswith("embedded:") and name.removeprefix("embedded:") not in EMBEDDED:
            yield path, f"found {name!r}; {nearest(name, [f'embedded:{one}' for one in EMBEDDED])}"
        elif missing(name):
            yield path, f"no such file or folder: {name} (looked from {Path.cwd()})."


EMBEDDED = (*SPLITS, "refusals")
"""What `embedded:` can name as data."""


def missing(name: str) -> bool:
    """A name that can only be meant as a local path, and is not there. (`org/name` may be a hub id, `a/b.jsonl` may not.)"""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILES
    return looks_local and not name.startswith("embedded:") and not Path(name).expanduser().exists()


FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Local files by their ending, and the reader of `datasets` that reads them."""
