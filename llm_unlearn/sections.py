"""The sections of a recipe: the model, the data, the training, the evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from importlib.util import find_spec
from typing import Annotated, Literal

from llm_unlearn.source import Source
from llm_unlearn.spec import FiniteFloat, NaturalInt, NonNegativeFloat, PositiveFloat, PositiveInt, Share, at_least_one, spec
from llm_unlearn.training.dose import Stop
from llm_unlearn.training.gradients import AnyRule
from llm_unlearn.training.privacy import Privacy


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
    layers: tuple[NaturalInt, ...] | None = None
    """Only these decoder layers, from 0; without it, all."""
    init: Literal["zero", "fila"] = "zero"
    """zero: B = 0, A at random. fila: from the weights that matter to the forget set and not to the retain set, by a
    Fisher-weighted singular value decomposition (LoKU, Cha et al. 2024, 2408.06621)."""


@spec
class Model:
    """The model that is to forget."""

    base: str
    """A hub id, a folder that `save_pretrained` wrote, a .gguf file, packaged:smollm2, embedded:target, or a recipe, which makes
    the model on first use; the cache keeps it."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    start: str | tuple[str, ...] | None = None
    """An adapter that belongs to the model as it is now (the fine-tuning to be unlearned, an earlier run), or several, in the order
    in which they were trained; merged before anything else."""
    adapter: Adapter | None = Adapter()
    """The adapter to train; null trains the full weights."""
    trainable: tuple[str, ...] | None = None
    """Of the full weights, train only those whose name holds one of these, such as `layers.7.mlp.down_proj`."""
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    """Load the frozen base in 4 or 8 bits (QLoRA, 2305.14314); needs an adapter and bitsandbytes."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the accelerator computes in it, fp32 elsewhere."""
    kernels: Literal["liger"] | None = None
    """liger: norms, rotary positions and gated feed-forward blocks by fused kernels (Liger Kernel, 2410.10989) while the run trains
    and looks at what it made; tried against the model itself first. Needs CUDA and the extra `liger`."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """The kernel of transformers' attention; without it, the architecture's own choice. flash_attention_2 and _3 need their
    packages and CUDA. Under sdpa and FlashAttention, training needs no padding."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template; without either, a plain question–answer layout is used."""

    @property
    def starts(self) -> tuple[str, ...]:
        """The adapters of `start`, none, one or several."""
        return (self.start,) if isinstance(self.start, str) else self.start or ()


def another(model: Model, base: str) -> Model:
    """Another model that is asked as this one is, such as the retrained one."""
    return replace(model, base=base, start=None, revision=None)


@spec
class Data:
    """What is to be forgotten and what is to be kept."""

    forget: Source
    retain: Source | None = None
    holdout: Source | None = None
    """Rows of the same kind that the model never saw; only looked at, by `train.stop`."""
    streams: Mapping[str, Source] | None = None
    """Further sets to be kept, by name, each read by a term of its own, such as general questions beside the retain set."""
    overlap: Literal["error", "drop"] = "error"
    """Rows that stand in the forget set and in one to be kept: refuse the run, or let them leave the latter."""

    @property
    def kept(self) -> dict[str, Source]:
        """Name -> source of every set to be kept: the retain set, then the further ones."""
        return ({"retain": self.retain} if self.retain else {}) | dict(self.streams or {})


Asking = Literal["adapter_off", "kept", "copy"]
"""How the model as it was is asked."""


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
    """Most tokens, padding included, in one forward pass per process. Sets speed and memory; gradients and losses
    agree to rounding for every value, and weights as far as the optimizer keeps rounding small (docs/reliability.md)."""
    micro_batch: Literal["auto"] | None = None
    """auto: instead of `batch_tokens`, as many tokens as fit into memory, found by a short probe before the first step."""
    optimizer: Literal["adamw", "sgd", "sophia", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """sophia divides by a running mean of squared gradients and clips (second order; SOUL, Jia et al. 2024, 2404.18239). The 8-bit
    ones keep their states in 8 bits, the paged one moves them to the CPU when memory is short; both need CUDA."""
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
    offload: Literal["activations"] | None = None
    """On CUDA, keep what the backward pass will ask for in CPU memory (with gradient checkpointing, the layers' inputs): less
    memory on the device, the time of copying. Weights stay where they are. On a CPU it does nothing."""
    compile: Literal["layers"] | None = None
    """Compile every decoder layer for the passes that make gradients (`torch.compile`): minutes at first, faster steps after."""
    reference: Asking | None = None
    """How the model as it was is asked, where a loss reads it: its adapter switched off at every step, its numbers taken once
    before training and kept in the cache, or a second model in memory. Without it, for each stream the cheaper of the first two,
    which `plan` shows; all give the same numbers."""
    checkpoint_every: PositiveInt = 50
    """Optimizer steps between two checkpoints, from which `--resume` goes on."""
    rules: tuple[AnyRule, ...] = ()
    """What acts on the whole step besides: project, bilevel, sharpness, latent, tamper, orthogonal, saliency, trust_region."""
    stop: Stop | None = None
    """How far to forget, and what it may cost."""
    privacy: Privacy | None = None
    """Train with (ε, δ)-differential privacy for every row: {epsilon, delta, clip}."""


@spec
class Threshold:
    """What a number of the suite must be: one of `at_most`, `at_least` and `judged`."""

    measure: str
    """Title of a measure, as the table shows it, such as `extraction strength`."""
    set: str
    """A set of the suite; of deletion requests, `forget` is measured on the rows of each by themselves."""
    at_most: FiniteFloat | None = None
    """Largest value that will do."""
    at_least: FiniteFloat | None = None
    """Smallest value that will do."""
    of: Literal["before", "retrained"] | None = None
    """Take the bound times this model's value: `at_least: 0.95, of: before`. Before is the model before the first request."""
    judged: Literal["as retrained"] | None = None
    """The table's judgement must be this."""

    @property
    def asked(self) -> str:
        """The bound in words."""
        if self.judged:
            return self.judged
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return f"{bound} of {self.of}" if self.of else bound


@spec
class Evaluation:
    """Which suite tells what is left."""

    suite: str
    """A suite file, such as eval/quick.yaml."""
    retrained: str | None = None
    """The model that never saw the forget set, or a recipe that makes it (kept in the cache); without it, what the suite names."""
    every: PositiveInt | None = None
    """Also run the suite every so many optimizer steps."""
    texts: bool | None = None
    """false: no question and no answer stands in what the run folder keeps of the evaluation, only numbers."""
    thresholds: tuple[Threshold, ...] | None = None
    """What must hold of the numbers: where one does not, the run says so, ends with status 1, and is not pushed."""


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "aim", "dvclive", "swanlab"]
PACKAGES = {name: f"llm-unlearn[{name}]" for name in ("tensorboard", "wandb", "mlflow", "trackio")} | {"comet_ml": "comet-ml"}
"""Tracker -> what pip installs, where it goes by another name."""


@spec
class Track:
    """Experiment trackers that are told what `log.jsonl` says, the recipe and the evaluation's numbers; they decide no outcome."""

    to: Annotated[tuple[TrackerName, ...], at_least_one]
    """One or several; each is a package of its own. Their files lie in the run folder."""
    project: str = "llm_unlearn"
    """What the runs of many recipes are gathered under."""
    name: str | None = None
    """Of the run; without it, its folder's."""
    every: PositiveInt = 1
    """Optimizer steps between two that are told; looks at the dose are told whenever they are made."""


def missing_tracker(track: Track) -> str:
    """How to get the first tracker whose package is not there; "" where all are."""
    for name in track.to:
        if find_spec(name) is None:
            return f"{name} is not installed; install it with: pip install '{PACKAGES.get(name, name)}', or take it out."
    return ""


def quantized_problems(model: Model, train: Train, instead: str) -> Iterable[tuple[tuple[str, ...], str]]:
    """Yield the keys that quantized weights do not go with, and why.

    Args:
        instead: what the recipe can have in their place.
    """
    if not model.adapter:
        yield ("model", "quantize"), f"quantized weights cannot be trained; give model.adapter, or {instead}."
    if train.reference == "copy":
        yield ("train", "reference"), "quantized weights cannot be copied; their adapter can be switched off: adapter_off."
    if model.adapter and model.adapter.init == "fila":
        text = "needs gradients of the base weights, and quantized ones have none"
        yield ("model", "adapter", "init"), f"{text}; give {instead}."
    if train.compile:
        yield ("train", "compile"), f"layers of quantized weights are not compiled; give compile: null, or {instead}."


Problems = Iterable[tuple[str, ...]]
"""What does not fit: a text, and the keys of the recipe that it is about."""
