"""How many floating-point operations the work needs, whoever does it, and how much memory it must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.rows import Row
from benchmarks.shapes import Shape

RANK = 16
EPOCHS = 5  # a recipe's default: what is done once for an example is spread over so many passes
Example = tuple[tuple[int, ...], int]


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
    d, m, kv = shape.hidden, shape.intermediate, shape.hidden * shape.kv_heads // shape.heads
    return [(d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d)]


def flops(row: Row, shape: Shape, window: Mapping[str, Sequence[Example]]) -> float:
    """What one optimizer step needs.

    With T tokens in the window, N answer tokens, P parameters in the linear layers that are run, V · D in the head, and sequences
    of L tokens in each of l layers:

        forward                 2 P T  +  2 V D N  +  Σ 2 D L² l          (causal attention: half of 4 D L²)
        backward, activations   the same from the lowest trained layer up
        backward, weights       2 × trained parameters × T                (of the head, which full weights train: × N)
        LoRA's own matrices     6 × their parameters × T
        the model as it was     its forward over what the loss reads, once for an example: 1/EPOCHS of it in a step

    That is 6 P T for full weights and 4 P T and a little for LoRA. The head is counted at answer positions only, nothing for
    padding, and nothing for what is computed again in the backward pass or from one epoch to the next. A loss on hidden states
    needs the layers up to the one that it reads, and no head. Optimizer, norms and softmax are not counted.
    """
    examples = [example for stream in window.values() for example in stream]
    chosen = row.trained_layers(shape.layers)
    run = shape.layers if chosen is None else chosen.stop
    backward = run - (chosen.start if chosen is not None else 0)

    def once(of: Sequence[Example], layers: int) -> float:
        part = replace(shape, layers=layers)
        return sum(forward(part, len(ids), 0 if row.method == "rmu" else len(ids) - answer) for ids, answer in of)

    tokens = sum(len(ids) for ids, _ in examples)
    total = once(examples, run) + once(examples, backward)
    if row.trains == "lora":
        total += 6 * RANK * sum(a + b for a, b in matrices(shape)) * backward * tokens
    elif row.trains == "few":
        total += 2 * shape.hidden * shape.intermediate * backward * tokens
    else:
        attention = sum(2 * shape.hidden * len(ids) ** 2 for ids, _ in examples) * shape.layers  # has no weights of its own
        total += once(examples, run) - attention
    read = {"npo": "forget", "kl": "retain", "rmu": "retain"}.get(row.method)
    return total + (once(window[read], run) / EPOCHS if read else 0)


def forward(shape: Shape, tokens: int, heads: int) -> float:
    """A forward pass over one sequence, `heads` of whose positions reach the head: as in `flops`."""
    body = 2 * tokens * sum(a * b for a, b in matrices(shape)) + 2 * shape.hidden * tokens**2
    return float(shape.layers * body + 2 * shape.vocabulary * shape.hidden * heads)


def weights(shape: Shape) -> int:
    """Parameters of embedding, layers and head."""
    layers = shape.layers * sum(a * b for a, b in matrices(shape))
    return layers + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)


def memory(row: Row, shape: Shape, bf16: bool) -> int:
    """Bytes that no way can do without: the weights, and of what is trained the gradient and AdamW's two moments, in float32."""
    layer, whole = sum(a * b for a, b in matrices(shape)), weights(shape)
    chosen = row.trained_layers(shape.layers)
    count = shape.layers if chosen is None else len(chosen)
    if row.trains == "lora":
        small = RANK * sum(a + b for a, b in matrices(shape)) * count
        each = 0.5 if row.quantize else 2 if bf16 else 4
        body = shape.layers * layer * each + (whole - shape.layers * layer) * (2 if bf16 else 4)
        return int(body + 16 * small)
    trained = whole if row.trains == "full" else shape.hidden * shape.intermediate * count
    return 4 * whole + 12 * trained
