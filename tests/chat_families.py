"""Chat templates in the manner of the published families, and what each writes around a conversation.

The templates are the project's own (`templates/NAME.jinja`). The table says in plain text what a template writes, so that expected
values do not come from a template engine.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm_unlearn.chat import Chat

TEMPLATES = Path(__file__).with_name("templates")

Text = Callable[[str], str]


def as_it_is(text: str) -> str:
    """Return a text unchanged."""
    return text


def trimmed(text: str) -> str:
    """Return a text without blanks around it."""
    return text.strip()


def without_leading_newlines(text: str) -> str:
    """Return a text without the line breaks before it."""
    return text.lstrip("\n")


def in_json(text: str) -> str:
    """Return a text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def in_html(text: str) -> str:
    """Return a text as HTML: quotes as the numbers that Jinja writes."""
    return html.escape(text, quote=False).replace('"', "&#34;").replace("'", "&#39;")


def indented(text: str) -> str:
    """Return a text, trimmed, with four blanks before every line but the first."""
    return text.strip().replace("\n", "\n    ")


def without_blank_lines(text: str) -> str:
    """Return a text, trimmed, with single line breaks in the place of double ones."""
    return text.strip().replace("\n\n", "\n")


@dataclass(frozen=True)
class Family:
    """Parts that a chat template writes."""

    name: str
    """The file of its template; `base` has none."""
    between: str
    """Text between the text of the last question and the answer's own text."""
    end: str
    """End of the last answer, up to its first special token; empty where nothing does."""
    ends: Literal["token", "text", "header"]
    """End of an answer that a model writes: a special token, a text, or the header of the next turn."""
    special: tuple[str, ...] = ()
    """Special tokens of its tokenizer."""
    added: tuple[str, ...] = ()
    """Further tokens of its tokenizer that are no special ones."""
    bos: str | None = None
    eos: str | None = None
    start: str = ""
    """Beginning of every conversation."""
    system: Literal["turn", "first question", "last question", "refused"] = "turn"
    """Place of the text of a system turn."""
    around_system: tuple[str, str] = ("", "")
    default_system: str | None = None
    """The system turn of a conversation that brings none."""
    question: str = ""
    """Text before a question."""
    earlier: tuple[str, str] = ("", "")
    """Text before and behind an earlier answer."""
    text: Text = as_it_is
    """Rendering of the text of a question."""
    answer: Text = as_it_is
    """Rendering of the text of an answer."""
    drops_answer: bool = False
    thinking: Literal["", "empty block", "by setting", "opened when asked", "channel"] = ""
    """Thoughts: none; an empty one before the last answer; one if told so; one that the generation prompt opens; a channel."""
    around_thought: tuple[str, str] | None = None
    """Text between the last question and a thought, and between that and the answer; None where the template has no place
    for thoughts, and one is put behind the generation prompt in marks of its own."""
    thought_end: str = "</think>"
    """End of a thought."""
    chat: Chat = field(default_factory=Chat)

    @property
    def label(self) -> str:
        """The name, with the setting of thinking where there is one."""
        return self.name if self.chat.thinking is None else f"{self.name}, thinking: {self.chat.thinking}"

    @property
    def template(self) -> str | None:
        """The chat template, or None of a base model."""
        return None if self.name == "base" else (TEMPLATES / f"{self.name}.jinja").read_text()

    def write_thought(self, turns: Sequence[dict[str, str]], thought: str) -> tuple[str, str, str, str, str]:
        """Return what stands before a thought, the thought, what stands between it and the last answer, that, and its end."""
        before, answer, end = self.write(turns)
        begin, close = self.around_thought or (self.between.rstrip(" ") + "<think>\n", "\n</think>\n\n")
        return before[: len(before) - len(self.between)] + begin, thought, close, answer, end

    def write(self, turns: Sequence[dict[str, str]]) -> tuple[str, str, str]:
        """Return what stands before the last answer's text, that text, and its end."""
        text, rest = self.start, list(turns)
        system = rest.pop(0)["content"] if rest[0]["role"] == "system" else self.default_system
        intro = "" if system is None else self.around_system[0] + system + self.around_system[1]
        if self.system == "turn":
            text += intro
        questions, answers = rest[0::2], rest[1::2]
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            last = i == len(questions) - 1
            told = (self.system == "first question" and i == 0) or (self.system == "last question" and last)
            text += self.question + (intro if told else "") + self.text(question["content"])
            if not last:
                text += self.earlier[0] + self.answer(answer["content"]) + self.earlier[1]
        return text + self.between, self.answer(rest[-1]["content"]), self.end


def _chatml(name: str, **more: object) -> Family:
    """Return a family that marks turns as ChatML does."""
    settings: dict[str, object] = {
        "between": "<|im_end|>\n<|im_start|>assistant\n",
        "end": "<|im_end|>",
        "ends": "token",
        "special": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "eos": "<|im_end|>",
        "around_system": ("<|im_start|>system\n", "<|im_end|>\n"),
        "question": "<|im_start|>user\n",
        "earlier": ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    }
    return Family(name, **{**settings, **more})  # type: ignore[arg-type]


def _llama3(name: str, **more: object) -> Family:
    """Return a family that marks turns as Llama 3 does."""
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    settings: dict[str, object] = {
        "between": header,
        "end": "<|eot_id|>",
        "ends": "token",
        "special": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "start": "<|begin_of_text|>",
        "around_system": ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        "question": "<|start_header_id|>user<|end_header_id|>\n\n",
        "earlier": (header, "<|eot_id|>"),
        "text": trimmed,
        "answer": trimmed,
    }
    return Family(name, **{**settings, **more})  # type: ignore[arg-type]


def _llama3_dated(name: str, knowledge: str) -> Family:
    header = f"<|start_header_id|>system<|end_header_id|>\n\n{knowledge}: December 2023\nToday: 26 Jul 2024\n\n"
    return _llama3(name, around_system=(header, "<|eot_id|>"), default_system="")


def _gemma(name: str, system: Literal["first question", "refused"]) -> Family:
    return Family(
        name,
        between="<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        ends="token",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        start="<bos>",
        system=system,
        around_system=("", "\n\n"),
        question="<start_of_turn>user\n",
        earlier=("<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
        text=trimmed,
        answer=trimmed,
    )


def _deepseek(name: str, thinking: Literal["", "opened when asked"]) -> Family:
    return Family(
        name,
        between="<｜Assistant｜>",
        end="<｜end▁of▁sentence｜>",
        ends="token",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        start="<｜begin▁of▁sentence｜>",
        question="<｜User｜>",
        earlier=("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        thinking=thinking,
        around_thought=("<｜Assistant｜><think>\n", "\n</think>\n\n"),
    )


def _smollm3(thinking: bool) -> Family:
    mode, block = ("/think", "") if thinking else ("/no_think", "<think>\n\n</think>\n")
    header = f"<|im_start|>system\n## Metadata\n\nToday: 26 July 2024\nReasoning: {mode}\n\n"
    return _chatml(
        "smollm3",
        between=f"<|im_end|>\n<|im_start|>assistant\n{block}",
        around_system=(header, "<|im_end|>\n"),
        default_system="You answer questions.",
        earlier=(f"<|im_end|>\n<|im_start|>assistant\n{block}", "<|im_end|>\n"),
        answer=without_leading_newlines,
        added=("<think>", "</think>"),
        thinking="by setting",
        chat=Chat(thinking=thinking),
    )


def _nemotron_nano(thinking: bool) -> Family:
    block = "" if thinking else "<think></think>"
    return Family(
        "nemotron_nano",
        between=f"\n<SPECIAL_11>Assistant\n{block}",
        end="\n<SPECIAL_12>",
        ends="token",
        special=("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"),
        eos="<SPECIAL_12>",
        around_system=("<SPECIAL_10>System\n", ""),
        default_system="",
        question="\n<SPECIAL_11>User\n",
        earlier=(f"\n<SPECIAL_11>Assistant\n{block}", "\n<SPECIAL_12>"),
        text=trimmed,
        answer=trimmed,
        thinking="opened when asked",
        chat=Chat(thinking=thinking),
    )


_EMPTY = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_THINK = ("<think>", "</think>")
_PLACED = ("<|im_end|>\n<|im_start|>assistant\n<think>\n", "\n</think>\n\n")
_GPT_OSS = "<|start|>system<|message|>You are a model with open weights.\nToday: 2024-07-26\n\nReasoning: "
_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
_GRANITE = "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
_COHERE = "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"

FAMILIES = (
    Family("llama2", between=" [/INST] ", end=" </s>", ends="token", special=("<s>", "</s>"), bos="<s>", eos="</s>",
           system="first question", around_system=("<<SYS>>\n", "\n<</SYS>>\n\n"), question="<s>[INST] ",
           earlier=(" [/INST] ", " </s>"), text=str.strip, answer=trimmed),
    _llama3("llama3"),
    _llama3_dated("llama31", "Knowledge ends"),
    _llama3_dated("llama32", "Knowledge until"),
    _chatml("qwen25", default_system="You help whoever asks."),
    _chatml("qwen3", between=_EMPTY, answer=without_leading_newlines, added=_THINK, thinking="empty block", around_thought=_PLACED),
    _chatml("qwen3", between=_EMPTY, answer=without_leading_newlines, added=_THINK, thinking="empty block",
            chat=Chat(thinking=False)),
    _chatml("qwen3_thinking", between=_EMPTY, answer=without_leading_newlines, added=_THINK, thinking="opened when asked",
            around_thought=_PLACED),
    _chatml("qwen35", between=_EMPTY, text=trimmed, answer=trimmed, added=_THINK, thinking="opened when asked",
            around_thought=_PLACED),
    _gemma("gemma2", system="refused"),
    _gemma("gemma3", system="first question"),
    Family("phi3", between="<|end|>\n<|assistant|>\n", end="<|end|>", ends="token", eos="<|endoftext|>",
           special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), question="<|user|>\n",
           around_system=("<|system|>\n", "<|end|>\n"), earlier=("<|end|>\n<|assistant|>\n", "<|end|>\n")),
    Family("phi4", between="<|im_end|><|im_start|>assistant<|im_sep|>", end="<|im_end|>", ends="token", eos="<|im_end|>",
           special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"), question="<|im_start|>user<|im_sep|>",
           around_system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
           earlier=("<|im_end|><|im_start|>assistant<|im_sep|>", "<|im_end|>")),
    Family("mistral_v1", between=" [/INST]", end="</s>", ends="token", special=("<s>", "</s>"), bos="<s>", eos="</s>", start="<s>",
           system="refused", question="[INST] ", earlier=(" [/INST]", "</s> ")),
    Family("mistral_v3", between="[/INST] ", end="</s>", ends="token", special=("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>",
           eos="</s>", start="<s>", system="last question", around_system=("", "\n\n"), question="[INST] ",
           earlier=("[/INST] ", "</s>"), answer=trimmed),
    Family("mistral_v7", between="[/INST] ", end="</s>", ends="token", bos="<s>", eos="</s>", start="<s>", question="[INST] ",
           special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
           around_system=("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"), earlier=("[/INST] ", "</s>")),
    Family("glm45", between="<|assistant|>\n<think></think>\n", end="", ends="header", eos="<|endoftext|>", added=_THINK,
           special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), start="[gMASK]<sop>",
           around_system=("<|system|>\n", ""), question="<|user|>\n", earlier=("<|assistant|>\n<think></think>\n", ""),
           answer=trimmed, thinking="empty block", around_thought=("<|assistant|>\n<think>", "</think>\n")),
    _deepseek("deepseek_v3", thinking=""),
    _deepseek("deepseek_r1", thinking="opened when asked"),
    Family("gpt_oss", between=_FINAL, end="<|return|>", ends="token", eos="<|return|>",
           special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
           start=f"{_GPT_OSS}medium\n\n# Channels: analysis, commentary, final.<|end|>",
           around_system=("<|start|>developer<|message|># Instructions\n\n", "\n\n<|end|>"), question="<|start|>user<|message|>",
           earlier=(_FINAL, "<|end|>"), thinking="channel", thought_end="<|end|>",
           around_thought=("<|end|><|start|>assistant<|channel|>analysis<|message|>", _FINAL)),
    _chatml("smollm2", default_system="You are a small model that helps."),
    _smollm3(thinking=True),
    _smollm3(thinking=False),
    Family("olmo2", between="\n<|assistant|>\n", end="<|endoftext|>", ends="token", special=("<|endoftext|>",), bos="<|endoftext|>",
           eos="<|endoftext|>", start="<|endoftext|>", around_system=("<|system|>\n", "\n"), question="<|user|>\n",
           earlier=("\n<|assistant|>\n", "<|endoftext|>\n")),
    Family("granite3", between=_GRANITE, end="<|end_of_text|>", ends="token", eos="<|end_of_text|>",
           special=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
           around_system=("<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"),
           default_system="Knowledge ends: April 2024.\nToday: July 26, 2024.\nYou are an assistant.",
           question="<|start_of_role|>user<|end_of_role|>", earlier=(_GRANITE, "<|end_of_text|>\n")),
    Family("falcon3", between="\n<|assistant|>\n", end="<|endoftext|>", ends="token", special=("<|endoftext|>",),
           eos="<|endoftext|>", added=("<|system|>", "<|user|>", "<|assistant|>"), question="<|user|>\n",
           around_system=("<|system|>\n", "\n"), earlier=("\n<|assistant|>\n", "<|endoftext|>\n")),
    Family("falcon", between="\n\nAssistant: ", end="", ends="header", special=("<|endoftext|>",), eos="<|endoftext|>",
           around_system=("", "\n\n"), question="User: ", earlier=("\n\nAssistant: ", "\n\n"), text=without_blank_lines,
           answer=without_blank_lines),
    Family("command_r", between=_COHERE, end="<|END_OF_TURN_TOKEN|>", ends="token", bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>",
           special=("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
                    "<|CHATBOT_TOKEN|>"),
           start="<BOS_TOKEN>", around_system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
           question="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", earlier=(_COHERE, "<|END_OF_TURN_TOKEN|>"), text=trimmed,
           answer=trimmed),
    _nemotron_nano(thinking=True),
    _nemotron_nano(thinking=False),
    _chatml("nemotron3", between="<|im_end|>\n<|im_start|>assistant\n<think></think>", default_system="", added=_THINK,
            earlier=("<|im_end|>\n<|im_start|>assistant\n<think></think>", "<|im_end|>\n"), answer=str.rstrip,
            thinking="opened when asked", around_thought=("<|im_end|>\n<|im_start|>assistant\n<think>\n", "\n</think>\n")),
    Family("vicuna", between=" ASSISTANT: ", end="</s>", ends="token", special=("<s>", "</s>"), bos="<s>", eos="</s>", start="<s>",
           around_system=("", " "), default_system="A person asks and an assistant answers.", question="USER: ",
           earlier=(" ASSISTANT: ", "</s>")),
    Family("zephyr", between="</s>\n<|assistant|>\n", end="</s>", ends="token", special=("<s>", "</s>"), bos="<s>", eos="</s>",
           around_system=("<|system|>\n", "</s>\n"), question="<|user|>\n", earlier=("</s>\n<|assistant|>\n", "</s>\n")),
    Family("alpaca", between="\n\n### Response:\n", end="\n\n", ends="header", special=("</s>",), eos="</s>",
           around_system=("", "\n\n"), question="### Instruction:\n", earlier=("\n\n### Response:\n", "\n\n"), text=trimmed,
           answer=trimmed),
    Family("base", between="\nAnswer: ", end="</s>", ends="token", special=("<s>", "</s>"), bos="<s>", eos="</s>", start="<s>",
           around_system=("", "\n"), question="Question: ", earlier=("\nAnswer: ", "</s>")),
    Family("sharegpt", between="<|sep|>\ngpt: ", end="<|sep|>", ends="text", special=("</s>",), eos="</s>",
           around_system=("system: ", "<|sep|>\n"), question="human: ", earlier=("<|sep|>\ngpt: ", "<|sep|>\n"),
           around_thought=("<|sep|>\ngpt: <think>\n", "\n</think>\n\n")),
    _chatml("parts"),
    Family("json_lines", between='"}\n{"role": "assistant", "content": "', end='"}', ends="text", special=("</s>",), eos="</s>",
           around_system=('{"role": "system", "content": "', '"}\n'), question='{"role": "user", "content": "',
           earlier=('"}\n{"role": "assistant", "content": "', '"}\n'), text=in_json, answer=in_json),
    Family("html", between='</div>\n<div class="assistant">', end="</div>", ends="text", special=("</s>",), eos="</s>",
           around_system=('<div class="system">', "</div>\n"), question='<div class="user">',
           earlier=('</div>\n<div class="assistant">', "</div>\n"), text=in_html, answer=in_html),
    Family("indented", between="\n--\nassistant:\n    ", end="\n--", ends="text", special=("</s>",), eos="</s>",
           around_system=("system:\n    ", "\n--\n"), question="user:\n    ", earlier=("\n--\nassistant:\n    ", "\n--\n"),
           text=indented, answer=indented, around_thought=("\n--\nassistant:\n    <think>\n", "\n</think>\n\n")),
    _chatml("no_answer", drops_answer=True),
    Family("no_end", between="<|assistant|>", end="", ends="header", special=("<|pad|>",), added=("<|user|>", "<|assistant|>"),
           around_system=("<|system|>", ""), question="<|user|>", earlier=("<|assistant|>", "")),
)  # fmt: skip
"""Every family, in the order of the issue that asked for them."""

HEAD = "| template | system turn | thinking | an answer ends with |\n|---|---|---|---|\n"
"""Head of the table of chat templates in docs/models.md."""
THINKING = {
    "": "none of its own",
    "empty block": "on and off by `chat.thinking`; off: an empty thought",
    "by setting": "on and off by `chat.thinking`",
    "opened when asked": "the generation prompt opens it",
    "channel": "always, in a channel of its own",
}
SYSTEM = {"turn": "yes", "first question": "in the first question", "last question": "in the last question", "refused": "refused"}


def table() -> str:
    """Return the table of chat templates in docs/models.md, without its head."""
    families = {family.name: family for family in FAMILIES if not family.drops_answer}
    lines = []
    for family in families.values():
        thinking = THINKING[family.thinking]
        if family.thinking == "opened when asked" and "enable_thinking" in (family.template or ""):
            thinking = f"{THINKING['by setting']}; on: {thinking}"
        has_end = family.end.strip() and family.ends != "header"
        end = "`{}`".format(family.end.strip().replace("|", "\\|")) if has_end else "the header of the next turn"
        lines.append(f"| {family.name} | {SYSTEM[family.system]} | {thinking} | {end} |\n")
    return "".join(lines)
