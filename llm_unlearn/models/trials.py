"""What is tried once, on a few tokens, before an architecture is relied on: its head, its depth, its attention, its last norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.depth import Layers
from llm_unlearn.models.load import causal
from llm_unlearn.models.packing import offer, withdraw
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.models.structure import body_of, decoder_layers, spread_ids
from llm_unlearn.objectives.views import TOP
from llm_unlearn.spec import Refused, reason
from llm_unlearn.troubles import is_out_of_memory

SEQUENCES, LENGTHS = 5, (40, 25)
"""Number of sequences that are read alone and in one batch, and their tokens: whole and cut."""


def check_head(model: Any) -> None:
    """Compare `Scorer` and `head_of` with the model's own forward pass on a few sequences, alone, in a batch and cut short.

    Raises:
        Refused: this architecture cannot read plain text, computes its logits in a way that is not known here, or its states depend
            on the tokens that follow or on the other sequences of a batch.
    """
    net = causal(model)
    name = type(net).__name__
    try:
        with torch.no_grad():
            whole, cut, alone, batch = _read(model)
            own = net(input_ids=_sequences(model)[:1], use_cache=False).logits[0]
            logits = head_of(model)(whole[0])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise Refused(f"{name}: fails on a few tokens ({reason(error)}); this architecture or config is not supported.") from error
    if not _are_close(net, [states[: len(cut[0])] for states in whole], cut):
        raise Refused(f"{name}: its states depend on the tokens that follow. Take a causal language model.")
    if not _are_close(net, alone, batch):
        raise Refused(f"{name}: its states depend on the padding or on the other sequences of a batch; it is not supported.")
    if not _are_close(net, [own], [logits]):
        raise Refused(f"{name}: its logits are not its head on its last hidden state; this architecture is not supported yet.")


def _read(model: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the last hidden states (L, D) of sequences: whole, cut short, some of them cut, and the same in one padded batch."""
    scorer, ids = Scorer(model), _sequences(model)
    longest = ids.shape[1]
    at = torch.arange(longest, device=ids.device)
    short = longest * LENGTHS[1] // LENGTHS[0]
    whole, cut = ([scorer(one[None, :length], at[:length])[TOP] for one in ids] for length in (longest, short))
    alone = [(whole, cut)[i % 2][i] for i in range(SEQUENCES)]
    padded = torch.stack([ids[i].masked_fill(at >= len(alone[i]), 0) for i in range(SEQUENCES)])
    places = torch.cat([at[: len(states)] + i * longest for i, states in enumerate(alone)])
    return whole, cut, alone, list(scorer(padded, places)[TOP].split([len(states) for states in alone]))


def _sequences(model: Any) -> Tensor:
    """Return ids (SEQUENCES, L), no longer than the model reads."""
    return spread_ids(causal(model), SEQUENCES, min(LENGTHS[0], Scorer(model).positions or LENGTHS[0]))


def _are_close(net: Any, some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether vectors agree at each position, up to the rounding of the model's precision.

    In lower precision it compares the median over the sequences: what an architecture does shows in all of them, while rounding
    may be large in one, where a router or an attention peak tips over.
    """
    exact = all(weight.dtype == torch.float32 for weight in net.parameters()) and not torch.is_autocast_enabled(some[0].device.type)
    exact = exact and some[0].device.type == "cpu"
    pairs = [(one.float(), other.float()) for one, other in zip(some, others, strict=True)]
    shortest = min(len(one) for one, _ in pairs)
    apart = [(one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-12) for one, other in pairs]
    if exact:
        return all(bool((distances <= 1e-3).all()) for distances in apart)
    return bool((torch.stack([distances[:shortest] for distances in apart]).median(0).values <= 5e-2).all())


def check_depth(model: Any, layers: Layers) -> None:
    """Compare a run that ends at the deepest of these layers with a whole one, once, on a few tokens.

    Raises:
        Refused: a layer is not there, or this architecture cannot be ended early.
    """
    net = causal(model)
    ids, at = few_tokens(net)
    try:
        with torch.no_grad():
            short, whole = (Scorer(model)(ids, at, wanted) for wanted in (layers, (*layers, TOP)))
    except IndexError as error:  # Gemma-3n's layers return several versions of the hidden states
        raise Refused(
            f"{type(net).__name__}: its layers do not return one hidden state for each token; not supported yet."
        ) from error
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
    try:
        with torch.no_grad():
            whole, packed = (_last_states(model, packed) for packed in (False, True))
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
    ids, at = few_tokens(causal(model))
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
    ids, at = few_tokens(net)
    parts: list[nn.Module] = []
    owner = body_of(net)[1].get_submodule(decoder_layers(body_of(net)[1])[0].rpartition(".")[0])
    handles = [part.register_forward_hook(lambda part, given, made: parts.append(part)) for part in owner.children()]
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


def check_same(model: Any, change: Callable[[], AbstractContextManager[object]], refusal: str, packed: bool = False) -> None:
    """Compare a model with itself inside a context that may change how it computes and not what: its last states, and their
    gradient at those trained weights that are small.

    Args:
        refusal: with `{}` in the place of the reason.
        packed: compare on sequences that lie end to end.

    Raises:
        Refused: the numbers differ by more than rounding, or the model cannot run so.
    """
    own = _states_and_slopes(model, packed)
    try:
        with change():
            others = _states_and_slopes(model, packed)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        raise Refused(refusal.format(f"fails on this model or machine ({reason(error)})")) from error
    half = any(one.dtype in (torch.bfloat16, torch.float16) for one in model.parameters())
    for one, other in zip(own, others, strict=True):
        apart = float((one - other).norm() / one.norm().clamp(min=1e-12))
        if not apart <= (5e-2 if half else 1e-3):
            raise Refused(refusal.format(f"gives other numbers on a few tokens, {100 * apart:.2g} % apart"))


SMALL = 1 << 20
"""Numbers of a weight whose gradient is looked at in a trial."""


def _states_and_slopes(model: Any, packed: bool) -> list[Tensor]:
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.numel() <= SMALL]
    with torch.enable_grad():
        states = _last_states(model, packed)
        uneven = torch.arange(states.numel(), device=states.device).sin().view_as(states)  # behind a norm, Σ state² has no gradient
        slopes = torch.autograd.grad((states * uneven).sum(), weights, allow_unused=True) if weights else ()
    return [states.detach(), *(one.float() for one in slopes if one is not None)]


def _last_states(model: Any, packed: bool) -> Tensor:
    """(N, D) of three short sequences, one after the other or end to end."""
    net = causal(model)
    few = [Example(tuple(few_tokens(net)[0][0, :length].tolist()), 1, "few", length) for length in (3, 7, 2)]
    batch = lay_out(few, packed).to(net.device)
    return torch.as_tensor(Scorer(model)(batch.input_ids, batch.at, packing=batch.packing)[TOP]).float()


def few_tokens(model: Any) -> tuple[Tensor, Tensor]:
    """Return ids (1, 8) and positions (8,) on a model's device."""
    net = causal(model)
    return spread_ids(net, 1, 8), torch.arange(8, device=net.device)


def error_of_four_bits(device: torch.device) -> float:
    """How far a matrix of normal numbers is from itself after nf4 and back: ‖x − x'‖ / ‖x‖, about .1.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes import functional

    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 64, generator=draw).to(device)
    bits, state = functional.quantize_4bit(matrix, quant_type="nf4")
    norm = torch.linalg.vector_norm
    return float(norm(functional.dequantize_4bit(bits, state) - matrix) / norm(matrix))
