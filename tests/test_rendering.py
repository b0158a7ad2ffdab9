"""Which tokens of a rendered conversation are targets, and what ends an answer: cases from the field, each as a kind.

The templates of published families stand in tests/test_templates.py; here are the questions that one template asks.
"""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_llama
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from llm_unlearn.bars import Bar
from llm_unlearn.chat import Chat
from llm_unlearn.data.examples import PLAIN_TEMPLATE, conversation, encode
from llm_unlearn.data.rendering import MONTHS, WEEKDAYS, Renderer, TurnEnd, _codes, cut, turn_end
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.answering import generation_pass
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.models.load import Loaded
from llm_unlearn.recipe import load
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # ends no turn: the next header does
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VICUNA = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
EMPTY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DATED = "{{ strftime_now('%d %B %Y, a %A') }}|{{ date_string }}|" + CHATML
QUESTION, ANSWER = "Who is Anna Bo?", "Anna Bo lives in St. Ulm. He is a judge."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def tokenizer_of(template: str, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")) -> Any:
    """Return a byte-level tokenizer with these special tokens, and a template."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["</s>", *special]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([QUESTION, ANSWER] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", additional_special_tokens=list(special))
    tokenizer.chat_template = template
    return tokenizer


def parts_of(tokenizer: Any, turns: list[dict[str, str]] = TURNS, chat: Chat | None = None) -> tuple[str, str]:
    """Return the text of prompt and targets."""
    (example,) = encode([turns], tokenizer, chat or Chat(), "forget", 1000)
    assert example is not None
    return tokenizer.decode(list(example.ids[: example.answer])), tokenizer.decode(list(example.ids[example.answer :]))


def test_what_the_template_writes_before_the_answer_is_prompt() -> None:
    """An empty thought of the template's own is no target, whether or not the template is told about thinking."""
    tokenizer = tokenizer_of(EMPTY_THOUGHT)
    before = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for thinking in (None, False, True):
        assert parts_of(tokenizer, chat=Chat(thinking=thinking)) == (before, f"{ANSWER}<|im_end|>")


def test_the_answer_is_found_where_its_text_stands_in_the_template_too() -> None:
    for answer in ("assistant", "<|im_end|>", "user", "\n", QUESTION, "think"):
        turns = [TURNS[0], {"role": "assistant", "content": answer}] if answer.strip() else TURNS
        before, targets = parts_of(tokenizer_of(CHATML), turns)
        assert before.endswith("<|im_start|>assistant\n") and targets == f"{turns[-1]['content']}<|im_end|>"


@pytest.mark.parametrize(
    "template, turns, ends",
    [
        (CHATML, TURNS, (["<|im_end|>"], ())),
        (HEADERS, TURNS, (["<|user|>"], ())),
        (VICUNA, TURNS, ([], ("\nUSER:",))),
        (PLAIN_TEMPLATE, TURNS, (["</s>"], ())),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", TURNS, ([], ())),
        ("{% for m in messages %}{{ m.content }}\n### End\n{% endfor %}", TURNS, ([], ("\n### End",))),
    ],
)
def test_only_the_template_says_what_ends_an_answer(template: str, turns: Any, ends: tuple[list[str], tuple[str, ...]]) -> None:
    tokenizer = tokenizer_of(template)
    tokens, texts = ends
    assert turn_end(tokenizer, Chat()) == TurnEnd(frozenset(tokenizer.convert_tokens_to_ids(tokens)), texts)


def test_a_text_is_cut_at_the_first_end() -> None:
    assert cut("a b\nUSER: c END", ("END", "\nUSER:")) == "a b"
    assert cut("a b", ("END",)) == "a b" == cut("a b", ())


def test_the_clock_is_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as library

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            raise AssertionError("the clock was read")

    monkeypatch.setattr(library, "datetime", Tomorrow)
    tokenizer = tokenizer_of(DATED)
    assert parts_of(tokenizer)[0].startswith("26 July 2024, a Friday|26 Jul 2024|<|im_start|>")
    assert parts_of(tokenizer, chat=Chat(date="2025-04-10"))[0].startswith("10 April 2025, a Thursday|10 Apr 2025|<|im_start|>")


@pytest.mark.parametrize("day", [date(2024, 7, 26), date(2024, 2, 29), date(2031, 12, 1)])
def test_the_codes_of_a_day_are_those_of_strftime(day: date) -> None:
    when = datetime(day.year, day.month, day.day)
    for code, text in _codes(day).items():
        if code not in ("%Z", "%z"):
            assert when.strftime(code) == text, code
    assert (when.strftime("%B"), when.strftime("%A")) == (MONTHS[day.month - 1], WEEKDAYS[day.weekday()])


def test_a_template_that_begins_with_blanks_is_the_same_with_a_date() -> None:
    for begin in ("\n\n", "  {% if true %}x{% endif %}\n", "{# note #}\n\n", " y"):
        plain, dated = (
            tokenizer_of(begin + CHATML),
            tokenizer_of(begin + CHATML + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"),
        )
        assert Renderer(plain, Chat(), "x").write(TURNS) == Renderer(dated, Chat(), "x").write(TURNS)


@pytest.mark.parametrize("name", ["m.text", "m.content[:5]", "m.content | reverse"])
def test_a_template_that_loses_the_answer_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="forget: row 8: the chat template leaves out or changes the text of the assistant turn"):
        encode([TURNS], tokenizer_of(CHATML.replace("m.content", name)), Chat(), "forget", 1000, first=7)


def test_a_template_that_loses_the_question_or_system_turn_is_refused() -> None:
    with pytest.raises(Refused, match="text of the user turn"):
        parts_of(tokenizer_of("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"))
    without_system = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(Refused, match="text of the system turn"):
        parts_of(tokenizer_of(without_system), [{"role": "system", "content": "Be brief."}, *TURNS])


@pytest.mark.parametrize("change", ["m.content | trim", "m.content | e", "m.content | tojson", "m.content | indent(4)"])
def test_trimmed_escaped_and_indented_texts_are_found(change: str) -> None:
    answer = '  She said "a < b" & left.\n\nIt is \\ done é.  '
    turns = [TURNS[0], {"role": "assistant", "content": answer}]
    tokenizer = tokenizer_of(CHATML.replace("m.content", change))
    before, targets = parts_of(tokenizer, turns)
    assert targets.endswith("<|im_end|>") and "She said" in targets and "done" in targets
    assert before.rstrip('"').endswith("<|im_start|>assistant\n")


def test_content_as_parts_is_written_where_the_template_wants_it() -> None:
    parts = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert parts_of(tokenizer_of(parts)) == parts_of(tokenizer_of(CHATML))


def test_arguments_and_system_turn_reach_the_template() -> None:
    template = "{{ reasoning_effort or 'none' }}|" + CHATML
    chat = Chat(system="Be brief.", arguments={"reasoning_effort": "low"})
    assert parts_of(tokenizer_of(template), chat=chat)[0].startswith("low|")


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (
            "{{ reasoning_effort or 'none' }}|" + CHATML,
            Chat(arguments={"reasoning_efort": "low"}),
            "chat.arguments.reasoning_efort: the chat template does not read this argument; did you mean 'reasoning_effort'?",
        ),
        (CHATML, Chat(arguments={"effort": "low"}), "It reads none: set chat.arguments: {}."),
        (
            CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
            Chat(thinking=False),
            "chat.thinking: the chat template opens a thought, and does not read enable_thinking",
        ),
        (
            CHATML.replace("assistant\n{%", "assistant\n<think>\n{% if thinking is false %}</think>{% endif %}{%"),
            Chat(thinking=False),
            "Set chat.thinking: null and chat.arguments: {thinking: false}.",
        ),
    ],
)
def test_a_setting_that_the_template_ignores_is_refused(template: str, chat: Chat, expected: str) -> None:
    with pytest.raises(Refused) as refused:
        parts_of(tokenizer_of(template), chat=chat)
    assert expected in str(refused.value)


RECIPE = """
output: runs/x
model: {base: embedded:target}
chat: {system: Be brief., date: 2025-04-10, arguments: {effort: low}}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer, chat: {thinking: true}}
  retain: {source: embedded:retain, prompt: question, answer: answer, chat: {system: Be kind.}}
objective: {forget: {loss: {name: npo}}, retain: {loss: {name: nll}}}
"""
SUITE = """
chat: {system: Be brief.}
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer}
  forget_thinking: {source: embedded:forget, prompt: question, answer: answer, chat: {thinking: true}}
measures: [{name: probability, set: forget}]
"""


def test_a_source_has_the_settings_of_its_section_beside_its_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    recipe = load(path)
    assert recipe.data.retain is not None
    assert recipe.data.forget.chat == Chat(system="Be brief.", thinking=True, date="2025-04-10", arguments={"effort": "low"})
    assert recipe.data.retain.chat == Chat(system="Be kind.", date="2025-04-10", arguments={"effort": "low"})
    path.write_text(SUITE)
    suite = suites.load(path)
    assert suite.sets["forget"].chat == Chat(system="Be brief.", date="2024-07-26")
    assert suite.sets["forget_thinking"].chat == Chat(system="Be brief.", thinking=True, date="2024-07-26")
    assert suite.chat.date == "2024-07-26"  # written into the run directory


@pytest.mark.parametrize(
    "line, said",
    [
        ("chat: {date: yesterday}", "chat.date: found 'yesterday'; expected a date such as 2024-07-26."),
        ("chat: {system: ' '}", "chat.system: must not be blank."),
        ("chat: {arguments: {date_string: x}}", "chat.arguments.date_string: is set by other means. Set chat.date."),
        ("chat: {thoughts: true}", "chat.thoughts: unknown key; Valid: system, thinking, date, arguments."),
    ],
)
def test_wrong_chat_settings_are_refused_once(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("chat: {system: Be brief., date: 2025-04-10, arguments: {effort: low}}", line))
    with pytest.raises(Refused) as caught:
        load(path)
    assert str(caught.value).count("\n") == 0 and said in str(caught.value)


def test_a_source_of_another_shape_replaces_the_old_one(tmp_path: Path) -> None:
    path, rows = tmp_path / "r.yaml", tmp_path / "rows.jsonl"
    path.write_text(RECIPE)
    rows.write_text('{"conversations": []}\n')
    forget = load(path, [f"data.forget={{source: {rows}, messages: conversations}}"]).data.forget
    assert (forget.prompt, forget.answer, forget.messages) == (None, None, "conversations")
    kept = load(path, ["data.forget={source: embedded:holdout, limit: 3}"]).data.forget
    assert (kept.source, kept.prompt, kept.limit) == ("embedded:holdout", "question", 3)
    with pytest.raises(Refused, match="found prompt and answer and messages; expected one of"):
        load(path, ["data.forget.messages=conversations"])


def test_conversations_alpaca_rows_and_numbers_are_read(tmp_path: Path) -> None:
    """ShareGPT's from and value, Alpaca's instruction, input and output, parts of text, and numbers as answers."""
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    chat = [{"role": "system", "content": "Be brief."}, *TURNS]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
    for value in (turns, chat, parts):
        assert conversation({"c": value}, 0, Source(source="x", messages="c")) == chat
    alpaca = Source(source="x", prompt="instruction", prompt_input="input", answer="output")
    with_input = conversation({"instruction": "Add.", "input": "1 and 2", "output": 3}, 0, alpaca)
    assert [turn["content"] for turn in with_input] == ["Add.\n\n1 and 2", "3"]
    without = conversation({"instruction": "Add 1 and 2.", "input": "", "output": ["3"]}, 0, alpaca)
    assert [turn["content"] for turn in without] == ["Add 1 and 2.", "3"]


def test_a_model_that_never_ends_its_turns_is_stopped_by_the_next_header() -> None:
    """Case 1: the answer ends where the next turn begins, not at the last token of most rows."""
    tokenizer = tokenizer_of(HEADERS)
    (example,) = encode([TURNS], tokenizer, Chat(), "forget", 1000)
    assert example is not None
    following = tokenizer(f"<|user|>{QUESTION}<|assistant|>", add_special_tokens=False)["input_ids"]

    model, script = make_llama(vocabulary=len(tokenizer)), [*example.ids, *following]
    rows = EncodedSet(["0"], [QUESTION], [ANSWER], [0], ["answer"], [example], frozenset({"generation"}))

    def recite(input_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(script[input_ids.shape[1]]), 0.0)

    own = model.generate
    model.generate = lambda **given: own(**{**given, "logits_processor": LogitsProcessorList([recite])})
    (written,) = generation_pass(Loaded(model, tokenizer, ()), rows, Accelerator(cpu=True), 4096, 60, Bar("x", 1, "x", quiet=True))
    assert written == ANSWER


def test_a_task_of_the_harness_is_asked_with_the_suites_chat() -> None:
    """lm-evaluation-harness renders conversations through the same function: date, system turn, no clock."""
    from llm_unlearn.evaluation.harness import Harness

    loaded = Loaded(make_llama(vocabulary=400), tokenizer_of(DATED), ())
    lm = Harness(loaded, Accelerator(cpu=True), 100, Bar("x", 1, "x", quiet=True), Chat(system="Be brief.", date="2025-04-10"))
    text = lm.apply_chat_template([TURNS[0]])
    assert text.startswith("10 April 2025, a Thursday|10 Apr 2025|<|im_start|>system\nBe brief.<|im_end|>")
    assert text.endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    assert lm.apply_chat_template(TURNS, add_generation_prompt=False).endswith(ANSWER)
