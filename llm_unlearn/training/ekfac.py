"""The Gauss–Newton matrix of linear layers as EK-FAC takes it; kronfluence finds the factors, and they are applied here."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task as KronfluenceTask
from torch import Tensor, nn

from llm_unlearn.bars import in_terminal
from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.load import trainable
from llm_unlearn.models.scores import Scorer, head_of, score
from llm_unlearn.spec import Refused
from llm_unlearn.training.vectors import Gradient


@dataclass(frozen=True)
class Factors:
    """Of each linear layer: G ≈ (Q_g ⊗ Q_a) Λ (Q_g ⊗ Q_a)ᵀ (George et al. 2018, 1806.03884; Grosse et al. 2023, 2308.03296)."""

    inputs: Mapping[str, Tensor]  # layer -> Q_a, (D_in, D_in), one more where the layer has a bias
    outputs: Mapping[str, Tensor]  # layer -> Q_g, (D_out, D_out)
    values: Mapping[str, Tensor]  # layer -> Λ, (D_out, D_in), mean over rows

    def solve(self, weights: Mapping[str, nn.Parameter], vector: Gradient, damping: float) -> Gradient:
        """(G + δ)⁻¹ v, layer by layer: Q_g ((Q_gᵀ V Q_a) / (Λ + δ)) Q_aᵀ, V the layer's part of v with the bias as last column."""
        parts = dict(zip(weights, vector, strict=True))
        found: dict[str, Tensor] = {}
        for layer, values in self.values.items():
            weight, bias = f"{layer}.weight", f"{layer}.bias"
            v = torch.cat([parts[weight], parts[bias][:, None]], 1) if bias in parts else parts[weight]
            q_a, q_g = self.inputs[layer].to(v), self.outputs[layer].to(v)
            solved = q_g @ ((q_g.T @ v @ q_a) / (values.to(v) + damping)) @ q_a.T
            found[weight] = solved[:, : parts[weight].shape[1]]
            if bias in parts:
                found[bias] = solved[:, -1]
        return [found[name] for name in weights]


class _Answers(KronfluenceTask):  # type: ignore[misc]  # the library has no types
    """What kronfluence asks about our rows: their answers' log-likelihood, true (sampled) answers for the Gauss–Newton matrix."""

    def __init__(self, layers: list[str], examples: Sequence[Example], accelerator: Accelerator) -> None:
        self.layers, self.examples, self.accelerator = layers, examples, accelerator

    def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
        found = score(
            Scorer(model), head_of(model), lay_out([self.examples[i] for i in batch.tolist()]).to(self.accelerator.device)
        )
        losses = []
        for scores in found.values():
            if sample:  # an answer token from the model's own distribution, whose mean squared gradient is the curvature
                logp = scores.logits.log_softmax(-1)
                drawn = torch.multinomial(logp.detach().exp(), 1)
                losses.append(-logp.gather(-1, drawn).sum())
            else:
                losses.append(-scores.logps.sum())
        return torch.stack(losses).sum()

    def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


def ekfac(model: Any, examples: Sequence[Example], seed: int, accelerator: Accelerator) -> Factors:
    """The factors of every linear layer that is trained.

    Raises:
        Refused: something else than the weights of linear layers is trained, or there is more than one process.
    """
    if accelerator.num_processes > 1:
        raise Refused("method.curvature: ekfac runs on one process; launch one, or give curvature: diagonal or cg.")
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in trainable(model))
    if other := [name for name in trainable(model) if name.rpartition(".")[0] not in linear]:
        raise Refused(
            f"method.curvature: ekfac covers linear layers, and {len(other)} other weights are trained, such as {other[0]}; name "
            "linear layers in model.trainable, such as [mlp, self_attn], or give model.adapter."
        )
    settings = FactorArguments(strategy="ekfac", use_empirical_fisher=False)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), as_before(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it makes a scaler by its old name
        torch.manual_seed(seed)
        task = _Answers(list(layers), examples, accelerator)
        wrapped = prepare_model(model, task)
        cpu = accelerator.device.type == "cpu"
        analyzer = Analyzer(
            "ekfac", wrapped, task, cpu=cpu, output_dir=folder, disable_tqdm=not in_terminal(), disable_model_save=True
        )
        rows: Any = [torch.tensor(i) for i in range(len(examples))]  # one at a time: padding would count as inputs
        analyzer.fit_all_factors("retain", dataset=rows, per_device_batch_size=1, factor_args=settings)
        vectors, values = analyzer.load_eigendecomposition("retain"), analyzer.load_lambda_matrices("retain")
    return Factors(
        vectors["activation_eigenvectors"],
        vectors["gradient_eigenvectors"],
        # by rows, not by the library's count: the output head sees one answer token after the other, and would count them
        {layer: one / len(examples) for layer, one in values["lambda_matrix"].items()},
    )


@contextlib.contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Inside, kronfluence may put its own layers in the place of the model's, and freeze it; afterwards nothing of it is left."""
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    try:
        yield
    finally:
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
        for weight, wanted in asked:
            weight.requires_grad_(wanted)
