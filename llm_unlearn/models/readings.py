"""What only some measures read off a model: log p under another way of sampling, distances to another model's distribution, and
the norm of a row's gradient.

Shapes as in `data/batch.py`: N answer tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm_unlearn.data.batch import Batch
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import causal
from llm_unlearn.models.scores import Scorer, Scores, head_of, score
from llm_unlearn.objectives.views import TOP
from llm_unlearn.spec import Refused


@torch.no_grad()
def renormalised(scores: Scores, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """(N,) log p of each target when tokens are drawn from softmax(logits / temperature), cut to the `top_k` likeliest and then to
    the fewest of them that hold `top_p`; −inf where the target is never drawn. The order of the cuts, and that tokens as likely as
    the last one of the top k stay, is transformers'."""
    found = []
    for here in map(scores.rows, scores.parts()):
        logits = here.logits / temperature  # (n, V)
        if top_k is not None and top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        if top_p < 1:
            ordered, place = logits.sort(descending=True)
            p = ordered.softmax(-1)
            out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, place, p.cumsum(-1) - p >= top_p)
            out.scatter_(-1, place[:, :1], False)  # the likeliest token always stays
            logits = logits.masked_fill(out, -torch.inf)
        found.append(logits.log_softmax(-1).gather(-1, here.targets[:, None])[:, 0].cpu())
    return torch.cat(found)


@torch.no_grad()
def swaps(scores: Scores, n: int) -> tuple[Tensor, Tensor]:
    """(N, n) twice: the log of p(w) / (1 − p(target)) for the n likeliest tokens w other than the target, −inf where there are no
    more, and these tokens."""
    odds, tokens = [], []
    for here in map(scores.rows, scores.parts()):
        logp = here.logits.double().log_softmax(-1).scatter(-1, here.targets[:, None], -torch.inf)  # (n, V), the target never
        found = logp.topk(min(n, logp.shape[-1]), dim=-1)
        odds.append((found.values - logp.logsumexp(-1, keepdim=True)).cpu())  # 1 − p(target) without its rounding
        tokens.append(found.indices.cpu())
    return torch.cat(odds), torch.cat(tokens)


@torch.no_grad()
def alternatives(scores: Scores, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What could stand at each answer position: (N, K) log p of the tokens given, (N,) the first choice.

    Args:
        tokens: (N, K)
    """
    logps, first = [], []
    for part in scores.parts():
        logits = scores.rows(part).logits  # (n, V)
        logps.append(logits.log_softmax(-1).gather(-1, tokens[part]).cpu())
        first.append(logits.argmax(-1).cpu())
    return torch.cat(logps), torch.cat(first)


@torch.no_grad()
def distances(scores: Scores, other: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(N,) KL(other ‖ model) and Jensen–Shannon divergence of the two, nats, over the whole vocabulary.

    Args:
        other: (N, D') what the other model's head reads at the same tokens.
        head: the other model's.
    """
    kl, js = [], []
    for part in scores.parts():
        mine = scores.rows(part).logits.double().log_softmax(-1)  # (n, V)
        theirs = head(other[part]).double().log_softmax(-1)
        middle = torch.logaddexp(mine, theirs) - np.log(2)
        kl.append(_kl(theirs, mine).cpu())
        js.append(((_kl(mine, middle) + _kl(theirs, middle)) / 2).cpu())
    return torch.cat(kl), torch.cat(js)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """(n, V), (n, V) -> (n,) from log-probabilities. Where p is 0 there is nothing to add, whatever q says."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def top_states(scores: Scores) -> Tensor:
    """(N, D) what the head reads, on the CPU in float32, which holds bf16 without a loss."""
    return scores.states[TOP].detach().float().cpu()


def head_arrays(head: Head) -> dict[str, NDArray[Any]]:
    """A head as arrays that can be kept on disk: with it, kept states give exact logits without their model.

    Raises:
        Refused: it is not one linear layer of floating-point weights.
    """
    layer = head.layer
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise Refused(f"knowledge_gap: the retrained model's output head is a {type(layer).__name__}, not a plain linear layer.")
    bias = {} if layer.bias is None else {"bias": layer.bias.detach().float().cpu().numpy()}
    facts = {"scale": np.array(head.scale), "cap": np.array(np.nan if head.cap is None else head.cap)}
    return {"weight": layer.weight.detach().float().cpu().numpy(), **bias, **facts}


def head_from(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> Head:
    """The head that `head_arrays` kept."""
    vocabulary, size = arrays["weight"].shape
    layer = nn.Linear(size, vocabulary, bias="bias" in arrays, device=device).requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(arrays["weight"]))
    if "bias" in arrays:
        layer.bias.copy_(torch.from_numpy(arrays["bias"]))
    cap = float(arrays["cap"])
    return Head(layer, vocabulary, float(arrays["scale"]), None if np.isnan(cap) else cap)


def gradient_norm(model: Any, batch: Batch) -> float:
    """The Euclidean norm of the gradient of NLL/T of one row, in eval mode.

    Over the floating-point weights of the model itself, with the adapter in force and its own weights left out: so models with
    and without one are measured on the same weights. It takes as much memory as these weights. Of a quantized model only what
    is not quantized counts, so its norms compare with those of models quantized alike.
    """
    weights = [weight for name, weight in causal(model).named_parameters() if weight.is_floating_point() and ".lora_" not in name]
    asked = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_()
        with torch.enable_grad():
            (scores,) = score(Scorer(model), head_of(model), batch).values()
            loss = -scores.logps.sum() / len(scores.targets)
        slopes = [slope for slope in torch.autograd.grad(loss, weights, allow_unused=True) if slope is not None]
        return float(torch.stack([torch.linalg.vector_norm(slope, dtype=torch.float32).double().cpu() for slope in slopes]).norm())
    finally:
        for weight, wanted in zip(weights, asked, strict=True):
            weight.requires_grad_(wanted)


def next_logits(model: Any, ids: Tensor, skip: Tensor) -> Tensor:
    """(B, L), (B,) -> (B, V) logits of the token behind the last of each row, of which the first `skip` are padding."""
    rows, length = ids.shape
    turned = (torch.arange(length, device=ids.device)[None] + skip[:, None]) % length  # padding to the right, where nothing sees it
    at = torch.arange(rows, device=ids.device) * length + length - skip - 1
    return head_of(model)(Scorer(model)(ids.gather(1, turned), at)[TOP])
