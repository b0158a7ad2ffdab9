"""Token ids and lengths that a model can read: the same answer in `plan`, `run` and `evaluate`, and generation that nothing but
the suite decides."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_cases import ROWS, write_case
from tokenizers import AddedToken

from llm_unlearn.cli import main
from llm_unlearn.evaluation.generation import Ask, written
from llm_unlearn.models.load import add_adapter, load
from llm_unlearn.models.outline import capacity_of
from llm_unlearn.sections import Adapter, Model

P = 16
WIDE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": P}
POSITIONS: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(**GPT), "gpt-bigcode": transformers.GPTBigCodeConfig(**GPT),
    "gptj": transformers.GPTJConfig(**GPT, rotary_dim=4), "codegen": transformers.CodeGenConfig(**GPT, rotary_dim=4),
    "opt": transformers.OPTConfig(**WIDE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=P),
    "gpt-neo": transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=P, window_size=8,
    ),
    "biogpt": transformers.BioGptConfig(**WIDE, intermediate_size=64, max_position_embeddings=P),
    "mpt": transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=P),
    "ctrl": transformers.CTRLConfig(**GPT, dff=64),
    "llama": transformers.LlamaConfig(**WIDE, intermediate_size=64, max_position_embeddings=P),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "xglm": transformers.XGLMConfig(
        vocab_size=64, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=P
    ),
    "mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_end_exactly_where_the_model_does(name: str) -> None:
    """Said without weights, and tried with them."""
    with torch.device("meta"):
        said = capacity_of(transformers.AutoModelForCausalLM.from_config(POSITIONS[name]), most=P + 1)
    assert said.tokens == 64
    net = transformers.AutoModelForCausalLM.from_config(POSITIONS[name]).eval()
    with torch.no_grad():
        net(input_ids=torch.ones((1, P), dtype=torch.long), use_cache=False)
        try:
            net(input_ids=torch.ones((1, P + 1), dtype=torch.long), use_cache=False)
            assert said.positions is None
        except (IndexError, RuntimeError):
            assert said.positions == P


def with_extra_token(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> Path:
    """A model whose tokenizer has one token beyond the embedding's rows, as those of Gemma-3 1B and 270M."""
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<image_soft_token>", special=True)])
    make_model(vocabulary=len(tokenizer), hidden_size=64).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def test_a_token_that_no_row_uses_is_no_problem(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_case(tmp_path, with_extra_token(make_model, tokenizer, tmp_path / "base"))
    assert main(["plan", str(recipe)]) == 0 and main(["run", str(recipe)]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["numbers"]


def test_a_token_that_rows_use_is_refused_everywhere(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = with_extra_token(make_model, tokenizer, tmp_path / "base")
    rows = [{**row, "answer": f"{row['answer']} <image_soft_token>"} for row in ROWS]
    recipe = write_case(tmp_path, base, rows)
    said = []
    for words in (["plan", str(recipe)], ["run", str(recipe)], ["evaluate", str(tmp_path / "suite.yaml"), "--model", str(base)]):
        assert main(words) == 2
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    number = f"token {len(tokenizer)} ('<image_soft_token>'), and {base} has embeddings for {len(tokenizer)} tokens"
    assert all(number in text for text in said) and len(set(said)) == 1, said
    assert not (tmp_path / "run").exists()


def gpt2(folder: Path, tokenizer: Any, positions: int) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=1024, n_embd=64, n_layer=2, n_head=4, n_positions=positions, bos_token_id=None, eos_token_id=3, pad_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_and_answers_end_at_the_learned_positions(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = gpt2(tmp_path / "base", tokenizer, 30)
    recipe = write_case(tmp_path, base)
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert f"forget: rows are cut to 30 tokens, the positions that {base} has" in said
    assert main(["run", str(recipe)]) == 0
    assert "warning: forget: rows are cut to 30 tokens" in capsys.readouterr().out
    loaded = load(Model(base=str(base), adapter=None), torch.device("cpu"))
    asks = [Ask(prompt=(5,) * 10, end=frozenset({3}), limit=200, unfinished=True)]
    ((_, tokens, ended),) = written(loaded, asks, 4096, torch.device("cpu"))
    assert len(tokens) + ended == 21 or ended, "the last token needs no position"


def test_an_exact_method_cuts_rows_to_the_learned_positions(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_case(tmp_path, gpt2(tmp_path / "base", tokenizer, 30))
    exact = ["objective=null", "method={name: sisa, shards: 1, slices: 1, aggregate: merge}", "train.window={retain: 2}"]
    for command in ("plan", "run"):
        assert main([command, str(recipe), *exact, "evaluation=null"]) == 0, capsys.readouterr().err


def test_a_row_whose_answer_does_not_fit_is_dropped_and_none_left_is_refused(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_case(tmp_path, gpt2(tmp_path / "base", tokenizer, 8))
    codes = [main([verb, str(recipe)]) for verb in ("plan", "run")]
    assert codes == [2, 2] and "max_tokens = 8" in capsys.readouterr().err


def test_computed_positions_beyond_the_models_own_are_said(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    make_model(hidden_size=64, max_position_embeddings=12).save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = write_case(tmp_path, base)
    for verb in ("plan", "run"):
        assert main([verb, str(recipe)]) == 0
        told = capsys.readouterr()
        assert f"and {base} was made for 12 (max_position_embeddings)" in told.out
    assert main(["evaluate", str(tmp_path / "suite.yaml"), "--model", str(base)]) == 0
    assert "warning: set forget: rows of up to" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- generation

SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "suppress_tokens": [7, 9, 30], "begin_suppress_tokens": [11, 12],
    "forced_bos_token_id": 5, "forced_eos_token_id": 6, "min_length": 30, "min_new_tokens": 9, "bad_words_ids": [[8], [10, 4]],
    "exponential_decay_length_penalty": [2, 1.5], "sequence_bias": [[[15], 40.0]], "encoder_repetition_penalty": 1.4,
    "encoder_no_repeat_ngram_size": 2, "guidance_scale": 2.0, "do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.4,
    "min_p": 0.3, "typical_p": 0.4, "num_beams": 3, "max_new_tokens": 2, "max_length": 4, "max_time": 0.0, "stop_strings": ["e"],
    "renormalize_logits": True, "length_penalty": 0.2, "early_stopping": True, "num_return_sequences": 2, "use_cache": False,
    "prompt_lookup_num_tokens": 3, "watermarking_config": {"greenlist_ratio": 0.2, "bias": 9.0}, "cache_implementation": "static",
}  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_is_the_likeliest_token_whatever_the_models_file_says(
    adapted: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    make_model(seed=3, hidden_size=64, initializer_range=0.08).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "pad_token_id": 0, **SETTINGS}))
    loaded = load(Model(base=str(base), adapter=None), torch.device("cpu"))
    own = loaded.causal.generation_config
    assert own.repetition_penalty == 1.7, "the file was read"
    net = add_adapter(loaded.model, Adapter(rank=2), 0) if adapted else loaded.model
    loaded = type(loaded)(net, loaded.tokenizer, loaded.parts)
    prompts = [(40, 41, 42, 7, 9), (50, 8, 51), (99, 15, 100, 101, 102, 103, 104)]
    asks = [Ask(prompt=prompt, end=frozenset({3}), limit=20, unfinished=True) for prompt in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {at: tokens for at, tokens, _ in written(loaded, asks, 4096, torch.device("cpu"))}
    for at, prompt in enumerate(prompts):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 20 and ids[-1] != 3:
                ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert found[at] == [token for token in ids[len(prompt) :] if token != 3], at
    assert loaded.causal.generation_config is own, "the model keeps its own settings, which are saved with it"
