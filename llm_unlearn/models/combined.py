"""Several adapters of one base as one model whose logits are made of theirs (`methods/combination.py`), for every part of the
project, and for transformers' `generate`, as any other causal language model.

The decoder is run once for each member, and its last hidden states stand side by side: S members of size D make states of size
S·D, of which the head makes each member's logits, and of these the combination's. So both parts of a transformers model, and with
them its own code between and around them, stay what they are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache

from llm_unlearn.hub.fetching import COMBINATION_FILE
from llm_unlearn.methods.combination import Combination
from llm_unlearn.models.head import Head
from llm_unlearn.models.structure import body_of
from llm_unlearn.spec import Refused, plain, typed
from llm_unlearn.written import object_in


def combine(net: Any, wanted: Combination) -> Any:
    """A causal model on the same weights whose logits are the combination's; `net` itself stays as it is.

    Args:
        net: a transformers causal LM in whose layers the members' adapters stand, under the members' names.

    Raises:
        Refused: an adapter is not there.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, BaseTunerLayer)]
    there = {name for layer in layers for kind in layer.adapter_layer_names for name in getattr(layer, kind)}
    if lacking := [name for name in wanted.adapters if name not in there]:
        others = ", ".join(sorted(there)) or "none"
        raise Refused(f"{COMBINATION_FILE}: member {lacking[0]!r} is no adapter of this model; there are {others}.")
    made = copy.copy(net)
    made._modules = dict(net._modules)  # as a shallow copy shares the table of its parts
    made.config = copy.deepcopy(net.config)
    head = Head.of(net.get_output_embeddings(), net.config.get_text_config())
    text = made.config.get_text_config()
    places = ((text, "logit_scale", 1.0), (made, "logit_scale", 1.0), (text, "logits_scaling", 1.0))
    for owner, name, neutral in (*places, (text, "final_logit_softcapping", None)):
        if getattr(owner, name, None) is not None:  # each member's logits are scaled and capped before they are combined
            setattr(owner, name, neutral)
    name, body = body_of(net)
    setattr(made, name, Members(body, layers, wanted))
    made.set_output_embeddings(CombinedHead(head, wanted))
    return made


def combination_of(net: Any) -> Combination | None:
    """What a model combines; None of any other."""
    head = net.get_output_embeddings()
    return head.wanted if isinstance(head, CombinedHead) else None


@contextmanager
def counted(net: Any, factor: float) -> Iterator[None]:
    """Inside, what stands beside the first member of a combined model counts `factor` times."""
    head = net.get_output_embeddings()
    whole = head.wanted
    try:
        head.wanted = whole.scaled(factor)
        yield
    finally:
        head.wanted = whole


class Members(nn.Module):
    """A decoder run once for each member, in the place of the decoder."""

    def __init__(self, decoder: Any, layers: list[Any], wanted: Combination) -> None:
        super().__init__()
        self.decoder, self.wanted = decoder, wanted
        self.adapted = tuple(layers)  # no list of parts: they are the decoder's

    def __getattr__(self, name: str) -> Any:
        """Whatever else one asks a decoder for is the decoder's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("decoder"), name)

    def forward(self, *given: Any, past_key_values: Any = None, use_cache: bool | None = None, **others: Any) -> Any:
        """As the decoder's, with states (B, L, S·D). The cache has S times as many layers: one member's behind the other's."""
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache(config=self.decoder.config)
        views: list[Any] = [None] * len(self.wanted.members) if cache is None else _views(cache, self.decoder.config, self.wanted)
        outputs = []
        for name, view in zip(self.wanted.members, views, strict=True):
            with self._as(name):
                outputs.append(self.decoder(*given, past_key_values=view, use_cache=view is not None, **others))
        made = outputs[0]
        made["last_hidden_state"] = torch.cat([one["last_hidden_state"] for one in outputs], dim=-1)
        if cache is not None:
            made["past_key_values"] = cache
        return made

    @contextmanager
    def _as(self, name: str | None) -> Iterator[None]:
        """Inside, one adapter is in force, or none. What may be trained stays so, which peft's own switch forgets."""
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self.adapted]
        try:
            for layer in self.adapted:
                layer._active_adapter, layer._disable_adapters = [name] if name else layer._active_adapter, name is None
            yield
        finally:
            for layer, (active, off) in zip(self.adapted, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, off


def _views(cache: Any, config: Any, wanted: Combination) -> list[Any]:
    """Each member's share of a cache, on the same layers; an empty one is first made S times as large."""
    count = len(wanted.members)
    if not cache.get_seq_length() and not getattr(cache, "members", None):
        one = cache.layers or DynamicCache(config=config).layers
        cache.layers = [copy.deepcopy(layer) for _ in range(count) for layer in one]
        cache.members = count
    if getattr(cache, "members", None) != count:
        raise ValueError(f"a cache of another model: found one for {getattr(cache, 'members', 1)} members, expected {count}")
    depth = len(cache.layers) // count
    views = [copy.copy(cache) for _ in range(count)]
    for number, view in enumerate(views):
        view.layers = cache.layers[number * depth : (number + 1) * depth]
    return views


class CombinedHead(nn.Module):
    """The members' logits from their states side by side, and the combination's from these."""

    def __init__(self, head: Head, wanted: Combination) -> None:
        super().__init__()
        self.layer, self.head, self.wanted = head.layer, head, wanted

    def forward(self, states: Tensor) -> Tensor:
        """(…, S·D) -> (…, V) float32"""
        parts = states.chunk(len(self.wanted.members), dim=-1)
        return combined([self.head(part) for part in parts], self.wanted)


def combined(logits: list[Tensor], wanted: Combination) -> Tensor:
    """S × (…, V) -> (…, V), the equation of `Combination`."""
    first, *others = logits
    w, *rest = wanted.weights
    if wanted.rule == "average":
        logs = [z.log_softmax(-1) + torch.tensor(weight).log() for z, weight in zip(logits, wanted.weights, strict=True)]
        return torch.stack(logs).logsumexp(0)
    made = w * first
    for weight, z in zip(rest, others, strict=True):
        made = made + weight * (z if wanted.rule == "sum" else (z - first).relu())
    return made


# ---------------------------------------------------------------------------------------------------------------- on disk


def is_combined(folder: Path) -> bool:
    """Whether a folder in the place of an adapter's holds several and says how they are combined."""
    return (folder / COMBINATION_FILE).is_file()


def read(folder: Path) -> Combination:
    """
    Raises:
        Refused: the file says no combination, or a member's folder is not there.
    """
    expected = "expected what a run writes there"
    found = typed(Combination, object_in(folder / COMBINATION_FILE, expected), str(folder / COMBINATION_FILE), expected)
    for name in found.adapters:
        if not (folder / name).is_dir():
            raise Refused(f"{folder / COMBINATION_FILE}: member {name!r}: no such folder beside it; write its adapter there again.")
    return found


def write(wanted: Combination, folder: Path) -> None:
    """Say how the adapters in the folders of their names are combined."""
    (folder / COMBINATION_FILE).write_text(json.dumps(plain(wanted), indent=1) + "\n", encoding="utf-8")
