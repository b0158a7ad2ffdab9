"""Broken models and adapters: a good folder, and one thing that is wrong with it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], object]
WEIGHTS, CONFIG, LORA = "model.safetensors", "config.json", "adapter_model.safetensors"


def text(name: str, said: str) -> Break:
    return lambda folder: (folder / name).write_text(said)


def gone(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names if (folder / name).exists()]


def changed(name: str, **keys: Any) -> Break:
    """Keys of a JSON file set, or taken out where they are None."""

    def change(folder: Path) -> None:
        held = json.loads((folder / name).read_text())
        held.update(keys)
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return change


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Break:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """The header of a safetensors file changed, its length told truly."""

    def changed(whole: bytes) -> bytes:
        size = struct.unpack("<Q", whole[:8])[0]
        held = json.loads(whole[8 : 8 + size])
        change(held)
        made = json.dumps(held).encode()
        return struct.pack("<Q", len(made)) + made + whole[8 + size :]

    return changed


def tensors(change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Break:
    """The tensors of a safetensors file changed."""

    def changed(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return changed


def fill(value: float) -> Callable[[dict[str, Any]], object]:
    """One number of the first matrix is this."""

    def change(held: dict[str, Any]) -> None:
        name = next(name for name, one in held.items() if one.dim() == 2)
        held[name] = held[name].clone()
        held[name][0, 0] = value

    return change


def as_pickle(name: str, to: str) -> Break:
    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(folder / name), folder / to)
        (folder / name).unlink()

    return change


def length(of: Callable[[int, int], int]) -> Callable[[bytes], bytes]:
    """The header's length told otherwise: (header, file) -> length."""
    return lambda whole: struct.pack("<Q", of(struct.unpack("<Q", whole[:8])[0], len(whole))) + whole[8:]


def cut(at: Callable[[int, int], int]) -> Callable[[bytes], bytes]:
    """The file cut: (header, file) -> how much of it is left."""
    return lambda whole: whole[: at(struct.unpack("<Q", whole[:8])[0], len(whole))]


def flip(at: int) -> Callable[[bytes], bytes]:
    """One bit of a byte turned round."""
    return lambda whole: whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :]


def of_safetensors(name: str) -> dict[str, Break]:
    """Everything that can be wrong with a safetensors file."""
    cuts: dict[str, Callable[[int, int], int]] = {
        "nothing": lambda h, n: 0, "half a length": lambda h, n: 4, "a length": lambda h, n: 8,
        "half a header": lambda h, n: 8 + h // 2,
        "a header": lambda h, n: 8 + h, "a header and a byte": lambda h, n: 9 + h, "half": lambda h, n: n // 2,
        "all but a byte": lambda h, n: n - 1, "all but a tensor": lambda h, n: n - 64,
    }  # fmt: skip
    lies: dict[str, Callable[[int, int], int]] = {
        "0": lambda h, n: 0, "1": lambda h, n: 1, "one less": lambda h, n: h - 1, "one more": lambda h, n: h + 1,
        "the whole file": lambda h, n: n, "beyond the file": lambda h, n: n + 1, "100 MB": lambda h, n: 100_000_001,
        "2⁶³": lambda h, n: 1 << 63, "2⁶⁴ - 1": lambda h, n: (1 << 64) - 1,
    }  # fmt: skip

    def first(held: dict[str, Any]) -> dict[str, Any]:
        return held[next(name for name in held if name != "__metadata__")]

    headers: dict[str, Callable[[dict[str, Any]], object]] = {
        "unknown type": lambda held: first(held).update(dtype="F7"),
        "offsets turned round": lambda held: first(held).update(data_offsets=first(held)["data_offsets"][::-1]),
        "offsets beyond": lambda held: first(held).update(data_offsets=[0, 1 << 40]),
        "shape of another size": lambda held: first(held).update(shape=[1, 1]),
        "shape beyond": lambda held: first(held).update(shape=[1 << 40, 1 << 40]),
        "no offsets": lambda held: first(held).pop("data_offsets"),
        "a tensor less": lambda held: held.pop(next(name for name in held if name != "__metadata__")),
        "empty": lambda held: held.clear(),
    }  # fmt: skip
    return {
        **{f"cut to {what}": bytes_of(name, cut(at)) for what, at in cuts.items()},
        **{f"length {what}": bytes_of(name, length(of)) for what, of in lies.items()},
        **{f"header with {what}": bytes_of(name, header(change)) for what, change in headers.items()},
        **{f"bit of byte {at}": bytes_of(name, flip(at)) for at in (0, 3, 7, 8, 9, 12, 20, 33)},
        "longer": bytes_of(name, lambda whole: whole + bytes(8)),
        "zeros": bytes_of(name, lambda whole: bytes(len(whole))),
        "text": text(name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "a pickle under its name": bytes_of(name, lambda whole: b"\x80\x04N."),
        "not a number": tensors(fill(float("nan")), name),
        "infinite": tensors(fill(float("inf")), name),
        "gone": gone(name),
    }


def shards(name: str) -> str:
    """An index that says that a weight lies in this file."""
    return json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}})


def extra(number: int) -> dict[str, Any]:
    """A token that the tokenizer has beside its own."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 1024 + number, "content": f"<extra{number}>", "special": True, **plain}


def sizes(**keys: Any) -> Break:
    return changed(CONFIG, **keys)


MODELS: dict[str, Break] = {
    **{f"weights: {what}": change for what, change in of_safetensors(WEIGHTS).items()},
    "weights: a pickle": as_pickle(WEIGHTS, "pytorch_model.bin"),
    "weights: other names": tensors(lambda held: [held.update({f"x.{name}": held.pop(name)}) for name in list(held)]),
    "weights: one lacking": tensors(lambda held: held.pop(next(name for name in held if "q_proj" in name))),
    "weights: no output head": tensors(lambda held: held.pop("lm_head.weight")),
    "weights: an index of shards that are gone": lambda folder: (
        (folder / f"{WEIGHTS}.index.json").write_text(shards("model-1.safetensors")),
        (folder / WEIGHTS).unlink(),
    ),
    "weights: a broken index": lambda folder: ((folder / f"{WEIGHTS}.index.json").write_text("{"), (folder / WEIGHTS).unlink()),
    "weights: an index out of the folder": lambda folder: (
        (folder / f"{WEIGHTS}.index.json").write_text(
            shards("../../../../etc/passwd")
        ),
        (folder / WEIGHTS).unlink(),
    ),
    "config: gone": gone(CONFIG),
    "config: empty": text(CONFIG, ""),
    "config: cut": text(CONFIG, '{"model_type": "lla'),
    "config: a list": text(CONFIG, "[]"),
    "config: null": text(CONFIG, "null"),
    "config: {}": text(CONFIG, "{}"),
    "config: binary": lambda folder: (folder / CONFIG).write_bytes(bytes(range(256))),
    "config: unknown kind": sizes(model_type="nosuch", architectures=["NoSuchForCausalLM"]),
    "config: kind a number": sizes(model_type=3),
    "config: an encoder": sizes(model_type="bert", architectures=["BertModel"]),
    "config: an image model": sizes(model_type="vit"),
    "config: wider": sizes(hidden_size=128),
    "config: narrower": sizes(hidden_size=32),
    "config: odd": sizes(hidden_size=65),
    "config: no heads": sizes(num_attention_heads=0),
    "config: minus a head": sizes(num_attention_heads=-4),
    "config: more heads than keys": sizes(num_key_value_heads=3),
    "config: deeper": sizes(num_hidden_layers=5),
    "config: shallower": sizes(num_hidden_layers=1),
    "config: no layers": sizes(num_hidden_layers=0),
    "config: more words": sizes(vocab_size=4096),
    "config: fewer words": sizes(vocab_size=100),
    "config: no words": sizes(vocab_size=0),
    "config: width as text": sizes(hidden_size="64"),
    "config: width null": changed(CONFIG, hidden_size=[]),
    "config: width beyond": sizes(hidden_size=1 << 62),
    "config: activation": sizes(hidden_act="nosuch"),
    "config: type of numbers": sizes(dtype="float7", torch_dtype="float7"),
    "config: rotary": sizes(rope_scaling={"rope_type": "nosuch"}, rope_parameters={"rope_type": "nosuch"}),
    "config: code of its own": sizes(auto_map={"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"}, model_type="own"),
    "config: quantized by others": sizes(quantization_config={"quant_method": "gptq", "bits": 4}),
    "config: quantized by nobody": sizes(quantization_config={"quant_method": "nosuch"}),
    "config: a padding word beyond": sizes(pad_token_id=99999),
    "config: dropout as text": sizes(attention_dropout="much"),
    "generation config: broken": text("generation_config.json", "{"),
    "tokenizer: gone": gone("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "tokenizer: slow only": gone("tokenizer.json"),
    "tokenizer: empty": text("tokenizer.json", ""),
    "tokenizer: cut": bytes_of("tokenizer.json", lambda whole: whole[: len(whole) // 2]),
    "tokenizer: {}": text("tokenizer.json", "{}"),
    "tokenizer: config broken": text("tokenizer_config.json", "{"),
    "tokenizer: config a list": text("tokenizer_config.json", "[]"),
    "tokenizer: unknown kind": text("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer"}'),
    "tokenizer: more words than the model": changed("tokenizer.json", added_tokens=[extra(i) for i in range(8)]),
    "tokenizer: binary": lambda folder: (folder / "tokenizer.json").write_bytes(bytes(range(256))),
    "folder: empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}  # fmt: skip
"""What is wrong with a model's folder."""

ADAPTER = "adapter_config.json"
ADAPTERS: dict[str, Break] = {
    **{f"weights: {what}": change for what, change in of_safetensors(LORA).items()},
    "weights: a pickle": as_pickle(LORA, "adapter_model.bin"),
    "weights: other names": tensors(
        lambda held: [held.update({name.replace("layers", "blocks"): held.pop(name)}) for name in list(held)], LORA
    ),
    "weights: half of them": tensors(
        lambda held: [held.pop(name) for name in list(held) if "lora_B" in name], LORA
    ),
    "weights: wider": tensors(
        lambda held: held.update({name: one.repeat(1, 2) for name, one in held.items() if "lora_A" in name}), LORA
    ),
    "weights: deeper": tensors(
        lambda held: held.update({name.replace("layers.0", "layers.7"): one.clone() for name, one in list(held.items())}), LORA
    ),
    "weights: one of the model's beside them": tensors(
        lambda held: held.update({"base_model.model.model.norm.weight": next(iter(held.values()))[0].clone()}), LORA
    ),
    "weights: of another kind, and none there": lambda folder: (
        changed(ADAPTER, peft_type="IA3", feedforward_modules=["up_proj"])(folder),
        tensors(lambda held: held.clear(), LORA)(folder),
    ),
    "weights: a layer that was trained whole is not there": changed(ADAPTER, modules_to_save=["lm_head"]),
    "config: gone": gone(ADAPTER),
    "config: empty": text(ADAPTER, ""),
    "config: cut": text(ADAPTER, '{"peft_type": "LO'),
    "config: {}": text(ADAPTER, "{}"),
    "config: a list": text(ADAPTER, "[]"),
    "config: a kind that is a list": changed(ADAPTER, peft_type=["LORA"]),
    "config: deep": text(ADAPTER, '{"a": ' * 5000),
    "config: binary": lambda folder: (folder / ADAPTER).write_bytes(bytes(range(256))),
    "config: unknown kind": changed(ADAPTER, peft_type="NOSUCH"),
    "config: another kind": changed(ADAPTER, peft_type="PREFIX_TUNING"),
    "config: another task": changed(ADAPTER, task_type="NOSUCH"),
    "config: other layers": changed(ADAPTER, target_modules=["c_attn"]),
    "config: no layers": changed(ADAPTER, target_modules=[]),
    "config: another rank": changed(ADAPTER, r=3),
    "config: rank 0": changed(ADAPTER, r=0),
    "config: rank as text": changed(ADAPTER, r="four"),
    "config: rank beyond": changed(ADAPTER, r=1 << 40),
    "config: alpha as text": changed(ADAPTER, lora_alpha="much"),
    "config: unknown key": changed(ADAPTER, nosuch=1),
    "folder: empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "combination: broken": text("combination.json", "{"),
    "combination: binary": lambda folder: (folder / "combination.json").write_bytes(bytes(range(256))),
    "combination: deep": text("combination.json", "[" * 5000),
    "combination: {}": text("combination.json", "{}"),
    "combination: of nothing": text("combination.json", '{"rule": "sum", "adapters": ["none"], "weights": [1]}'),
}  # fmt: skip
"""What is wrong with an adapter's folder."""
