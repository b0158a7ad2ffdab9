"""What is tried once, on a few tokens, before an architecture is relied on: its head, its depth, its attention, its last norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.depth import Layers
from llm_unlearn.models.load import causal
from llm_unlearn.models.packing import offer, withdraw
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.views import TOP
from llm_unlearn.spec import Refused


def check_head(model: Any) -> None:
    """Compare `Scorer` and `head_of` with the model's own forward pass, once, on a few tokens.

    Raises:
        Refused: this architecture computes its logits in a way that is not known here.
    """
    net = causal(model)
    ids, at = _few_tokens(net)
    with torch.no_grad():
        own = net(input_ids=ids, use_cache=False).logits[0].float()
        ours = head_of(model)(Scorer(model)(ids, at)[TOP])
    if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise Refused(
            f"{type(net).__name__}: its logits are not its head on its last hidden state; this architecture is not supported yet."
        )


def check_depth(model: Any, layers: Layers) -> None:
    """Compare a run that ends at the deepest of these layers with a whole one, once, on a few tokens.

    Raises:
        Refused: a layer is not there, or this architecture cannot be ended early.
    """
    net = causal(model)
    ids, at = _few_tokens(net)
    with torch.no_grad():
        short, whole = (Scorer(model)(ids, at, wanted) for wanted in (layers, (*layers, TOP)))
    if not all(torch.allclose(short[layer], whole[layer], rtol=1e-3, atol=1e-3) for layer in layers):
        raise Refused(f"{type(net).__name__}: ends differently when its upper layers are left out; not supported yet.")


def can_pack(model: Any, longest: int) -> bool:
    """Let a model read sequences that lie end to end, where it can, and try it once on a few tokens.

    Args:
        longest: tokens of the longest sequence that will come.
    """
    net = causal(model)
    if not offer(net, longest):
        return False
    lengths = (3, 7, 2)
    few = [Example(tuple(_few_tokens(net)[0][0, :length].tolist()), 1, "few", length) for length in lengths]
    try:
        with torch.no_grad():
            whole, packed = (
                Scorer(model)(batch.input_ids, batch.at, packing=batch.packing)[TOP]
                for batch in (lay_out(few, packed).to(net.device) for packed in (False, True))
            )
        if torch.allclose(whole, packed, rtol=2e-2, atol=2e-2 * float(whole.abs().max())):
            return True
    except (NotImplementedError, TypeError, ValueError, RuntimeError, ImportError):
        pass  # another kind of attention, or an architecture that does not hand on what it is given
    withdraw(net)
    return False


def freeze_unreached(model: Any, layers: Layers) -> None:
    """Leave out of the training what no loss can reach when all of them end at these layers.

    Raises:
        Refused: nothing trainable is left.
    """
    ids, at = _few_tokens(causal(model))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.enable_grad():
        made = torch.stack([one.float().sum() for one in Scorer(model)(ids, at, layers).values()]).sum()
    reached = torch.autograd.grad(made, weights, allow_unused=True) if made.requires_grad else [None] * len(weights)
    for weight, gradient in zip(weights, reached, strict=True):
        weight.requires_grad_(gradient is not None)
    if all(gradient is None for gradient in reached):
        deepest = max(layers)
        raise Refused(
            f"objective: its losses end at layer {deepest}, and nothing trainable stands at or below it; see model.adapter.layers."
        )


def last_norm(model: Any) -> nn.Module:
    """What stands between the last decoder layer and the head: any layer's output read through it is a logit lens.

    Raises:
        Refused: the last hidden states are not one part's work on the last layer's output.
    """
    net = causal(model)
    ids, at = _few_tokens(net)
    parts: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda part, given, made: parts.append(part)) for part in net.base_model.children()]
    deepest = int(net.config.get_text_config().num_hidden_layers) - 1
    try:
        with torch.no_grad():
            states = Scorer(model)(ids, at, (deepest, TOP))
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        if not parts or not torch.allclose(parts[-1](states[deepest]), states[TOP], rtol=1e-3, atol=1e-3):
            raise Refused(
                f"{type(net).__name__}: the norm under its head was not found; its layers cannot be read by the head yet."
            )
    return parts[-1]


def _few_tokens(net: Any) -> tuple[Tensor, Tensor]:
    ids = torch.arange(1, 9, device=net.device)[None] % net.config.get_text_config().vocab_size
    return ids, torch.arange(8, device=net.device)
