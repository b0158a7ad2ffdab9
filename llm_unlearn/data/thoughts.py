"""Thoughts of reasoning models: where a template writes one, and where in a rendered conversation it stands.

A template that reads `reasoning_content` or `thinking` of a turn places the thought itself. For any other the conversation is
composed of its generation prompt with thinking on, the thought, its closing mark and the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llm_unlearn.chat import Chat
from llm_unlearn.data.rendering import MARKER, Renderer, Rendering, Turn, TurnEnd, end_in, first_end, own_tokens, same
from llm_unlearn.spec import Refused

KEYS = ("reasoning_content", "thinking")
"""Names under which chat templates read the thought of a turn."""
MARKS = ("<think>\n", "\n</think>\n\n")
"""Marks that open and close a thought where neither the template nor the row says."""
THOUGHT_MARKER = "Zq7xThoughtQz"


@dataclass(frozen=True)
class Opening:
    """Text before a thought and behind it."""

    text: str
    """The conversation up to the thought's first character."""
    close: str
    """Text between the thought and the answer."""
    key: str | None
    """The name under which the template reads a thought; None where it has no place for one."""

    def end(self, tokenizer: Any) -> TurnEnd:
        """Return what ends a thought that a model writes."""
        return end_in(tokenizer, self.close.strip())


def split_thought(text: str) -> Turn | None:
    """Return the parts of an answer that begins with a thought in `<think>` marks, as keys of a turn; None where it does not."""
    parts = re.fullmatch(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", text, re.DOTALL)
    if not parts or not parts[2]:
        return None
    return {"content": parts[4], "thought": parts[2], "thought_open": parts[1], "thought_close": parts[3]}


class Thinker:
    """Renders conversations whose answer has a thought before it, with thinking on unless the settings say otherwise."""

    def __init__(self, tokenizer: Any, chat: Chat, stream: str) -> None:
        """
        Args:
            stream: named in errors.
        """
        self.render = Renderer(tokenizer, chat if chat.thinking is not None else replace(chat, thinking=True), stream)

    def opening(self, before: list[Turn], marks: tuple[str, str] = MARKS) -> Opening:
        """Return what stands around a thought that follows these turns."""
        write = self.render.write
        for key in KEYS:
            text = write([*before, {"role": "assistant", "content": MARKER, key: THOUGHT_MARKER}])
            opened, placed, rest = text.partition(THOUGHT_MARKER)
            close, answered, _ = rest.partition(MARKER)
            if placed and answered and close.strip():
                return Opening(opened, close, key)
        prompt = write(before, ask=True)
        told = prompt.rfind(before[-1]["content"].strip())
        is_open = prompt.rfind("<think>") > max(prompt.rfind("</think>"), told)
        return Opening(prompt if is_open else prompt + marks[0], marks[1], None)

    def __call__(self, turns: list[Turn], row: int) -> Rendering:
        """Render a conversation.

        Raises:
            Refused: the template leaves out or changes the text of the thought or of a turn.
        """
        *before, last = turns
        thought = last["thought"]
        around = self.opening(before, (last.get("thought_open", MARKS[0]), last.get("thought_close", MARKS[1])))
        plain = self.render([*before, {"role": "assistant", "content": last["content"]}], row)
        answer, begin = plain.text[plain.answer_begin : plain.answer_end], len(around.text)
        if around.key is None:
            text = around.text + thought + around.close + plain.text[plain.answer_begin :]
            return self._placed(plain, text, begin, begin + len(thought), around.close, answer)
        text = self.render.write([*before, {"role": "assistant", "content": last["content"], around.key: thought}])
        if text.startswith(around.text):
            for end in _finds(text, around.close, begin):
                if text.startswith(answer, end + len(around.close)) and same(text[begin:end], thought):
                    return self._placed(plain, text, begin, end, around.close, answer)
        raise self.render.leaves_out("assistant", row)

    def _placed(self, plain: Rendering, text: str, begin: int, end: int, close: str, answer: str) -> Rendering:
        """Return a rendering whose thought stands at begin … end."""
        marks = own_tokens(self.render.tokenizer)
        answer_begin = end + len(close)
        answer_end = answer_begin + len(answer)
        stop = answer_end + first_end(text[answer_end:], marks)
        return Rendering(text[:stop], plain.question_end, answer_begin, answer_end, begin, end + first_end(close, marks))


def check_thought(last: Turn, where: str) -> None:
    """Check that an answer whose thought is wanted has one.

    Raises:
        Refused: it has none.
    """
    if not last.get("thought"):
        what = "has no thought, and targets asks for one"
        raise Refused(f"{where}: {what}. Name the column of thoughts in `thought`, or set targets: answer.")


def _finds(text: str, part: str, start: int) -> Iterator[int]:
    """Yield where a part of a text occurs."""
    at = text.find(part, start)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
