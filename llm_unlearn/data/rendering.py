"""Render conversations by a chat template, and find the row's own answer in what was rendered.

What the template writes before the answer's text is prompt: headers, an empty thought, a channel. The answer's text and what ends
its turn are targets. The answer is found by rendering the same turns with a marker in its place.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cache
from typing import Any

import jinja2
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import LoopControlExtension
from jinja2.meta import find_undeclared_variables

from llm_unlearn.chat import OWN, Chat
from llm_unlearn.data.patience import at_most
from llm_unlearn.spec import Refused, nearest, shown
from llm_unlearn.unsaid import column_name, without_quotes

LONGEST = 20.0
"""Seconds of processor time that a chat template may take for one conversation: thousands of times what any takes."""
MARKER, QUESTION_MARKER = "Zq7xAnswerQz", "Zq7xQuestionQz"
"""Stand in for the text of a turn: letters and digits, which no template trims, escapes or re-indents."""

Turn = dict[str, str]
"""One turn of a chat: role and content; an answer may have a `thought` before it (`data/thoughts.py`)."""


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation, and where in it the parts of its last exchange stand (character offsets into `text`)."""

    text: str
    """Ends where the last turn ends."""
    question_end: int
    """End of the text of the turn before the answer."""
    answer_begin: int
    answer_end: int
    thought_begin: int | None = None
    """Begin of the text of the thought before the answer, where it has one."""
    thought_end: int | None = None
    """End of what closes that thought."""


@dataclass(frozen=True)
class TurnEnd:
    """End of an answer that a model writes, besides the eos tokens of tokenizer and model."""

    tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


FUNCTIONS = frozenset({"raise_exception", "strftime_now", *DEFAULT_NAMESPACE})
"""Names that a template reads and no setting gives."""


@cache
def variables_of(template: str) -> frozenset[str] | None:
    """Return the names that a chat template reads and does not set itself; None where it cannot be parsed."""
    without_marks = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # a tag of transformers alone
    try:
        parsed = jinja2.Environment(extensions=[LoopControlExtension]).parse(without_marks)
        return frozenset(find_undeclared_variables(parsed))
    except jinja2.TemplateError:  # said when it is rendered
        return None


@dataclass
class Renderer:
    """Renders conversations by the chat template of a tokenizer."""

    tokenizer: Any
    chat: Chat
    stream: str
    """Named in errors."""
    _parts: bool = False
    """The template reads content as a list of parts."""
    _before: tuple[list[Turn], tuple[str, str]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        turns = [{"role": "user", "content": QUESTION_MARKER}, {"role": "assistant", "content": MARKER}]
        if not self._can_read(turns):
            self._parts = True
            self._parts = self._can_read(turns)
        self._check_settings(turns[:1])

    def _check_settings(self, asked: list[Turn]) -> None:
        """Check that the template reads the settings of the section `chat`: one that it ignores changes nothing unnoticed.

        Raises:
            Refused: it does not read an argument, or opens a thought that cannot be switched off.
        """
        read = variables_of(self.tokenizer.get_chat_template())
        if read is None:
            return
        for name in self.chat.arguments:
            if name not in read:
                known = sorted(read - set(OWN) - set(self.tokenizer.special_tokens_map) - FUNCTIONS)
                fix = nearest(name, known) if known else "It reads none: set chat.arguments: {}."
                found = shown(name, as_it_is=True)
                raise Refused(f"{self.stream}: chat.arguments.{found}: the chat template does not read this argument; {fix}")
        if self.chat.thinking is False and "enable_thinking" not in read:
            try:
                prompt = self.write(asked, ask=True)
            except Refused:  # said of the first row, with its turns
                return
            if prompt.rfind("<think>") > prompt.rfind("</think>"):
                fix = "Set chat.thinking: null" + (" and chat.arguments: {thinking: false}." if "thinking" in read else ".")
                why = "the chat template opens a thought, and does not read enable_thinking"
                raise Refused(f"{self.stream}: chat.thinking: {why}, so thinking cannot be switched off. {fix}")

    def _can_read(self, turns: list[Turn]) -> bool:
        try:
            text = self.write(turns)
        except Refused:  # said of the first row, with its turns
            return False
        listed = re.search(rf"text['\"]: ['\"]{MARKER}", text)  # the list of parts itself was printed
        return MARKER in text and QUESTION_MARKER in text and not listed

    def __call__(self, turns: list[Turn], row: int) -> Rendering:
        """Render a conversation whose last turn is the answer.

        Args:
            row: number of the row, counted from 0, for errors.

        Raises:
            Refused: the template does not take such turns, leaves out the text of one, or changes the answer's text.
        """
        answer = turns[-1]["content"]
        text, (before, after) = self.write(turns), self.frame(turns[:-1], row)
        if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
            begin, end = len(before), len(text) - len(after)
        else:  # the template writes something else around such an answer
            begin = text.rfind(answer.strip())
            end = begin + len(answer.strip())
        if begin < 0 or not same(text[begin:end], answer):
            raise self.leaves_out("assistant", row)
        for turn in turns[:-1]:
            if not _holds(text[:begin], turn["content"]):
                raise self.leaves_out(turn["role"], row)
        stop = end + first_end(text[end:], own_tokens(self.tokenizer))
        return Rendering(text[:stop], _end_of(text[:begin], turns[-2]["content"]) if turns[:-1] else begin, begin, end)

    def frame(self, before: list[Turn], row: int) -> tuple[str, str]:
        """Return what the template writes before and behind an answer to these turns."""
        if self._before is None or self._before[0] != before:  # several answers to one question follow each other
            text = self.write([*before, {"role": "assistant", "content": MARKER}])
            at = text.rfind(MARKER)
            if at < 0:
                raise self.leaves_out("assistant", row)
            self._before = before, (text[:at], text[at + len(MARKER) :])
        return self._before[1]

    def leaves_out(self, role: str, row: int) -> Refused:
        """Return the error of a turn whose text is not in what the template writes."""
        return Refused(
            f"{self.stream}: row {row + 1}: the chat template leaves out or changes the text of the {shown(role, as_it_is=True)} "
            "turn, so its tokens cannot be told from the template's. Set model.chat_template to a file that writes `content`."
        )

    def write(self, turns: Sequence[Turn], ask: bool = False) -> str:
        """Return turns as the template writes them, with its generation prompt where `ask` is set.

        Raises:
            Refused: it has no place for such turns, or is no template.
        """
        told: Any = [{key: value for key, value in turn.items() if not key.startswith("thought")} for turn in turns]
        if self._parts:
            told = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in told]
        try:
            with at_most(LONGEST):
                return apply_template(self.tokenizer, told, self.chat, ask)
        except Exception as error:  # a template is a program, and may raise what it likes
            roles = ", ".join(column_name(turn["role"]) for turn in turns)
            why = without_quotes(" ".join(str(error).split()))
            if _repeats(why, turns):
                why = type(error).__name__
            found = f"{shown(roles, as_it_is=True)} ({shown(why, 300, as_it_is=True)})"
            said = f"{self.stream}: the chat template does not take turns of {found}"
            raise Refused(f"{said}; give model.chat_template a file that does, or the rows other roles.") from error


def apply_template(tokenizer: Any, turns: Sequence[Any], chat: Chat, ask: bool = False, unfinished: bool = False) -> str:
    """Return turns as the chat template writes them. The date is that of the settings; the clock is never read.

    Args:
        ask: end with the generation prompt.
        unfinished: end with the text of the last turn, which is to be continued.
    """
    template, day = tokenizer.get_chat_template(), chat.day
    arguments: dict[str, Any] = dict(chat.arguments)
    if chat.thinking is not None:
        arguments["enable_thinking"] = chat.thinking
    if "strftime_now" in template:
        template, arguments["codes_of_the_day"] = STRFTIME + template, _codes(day)
    arguments["date_string"] = f"{day.day:02d} {MONTHS[day.month - 1][:3]} {day.year}"
    arguments |= {"chat_template": template, "add_generation_prompt": ask, "continue_final_message": unfinished}
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **arguments))


STRFTIME = (
    "{%- macro strftime_now(format) %}{% set text = namespace(now=format) %}{% for code, value in codes_of_the_day.items() %}"
    "{% set text.now = text.now | replace(code, value) %}{% endfor %}{{ text.now }}{% endmacro %}\n"
)
"""Takes the place of the function of this name, which reads the clock. A template sees plain data only, so the function is written
in Jinja. The line's end is dropped by the environment (`trim_blocks`)."""


MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _codes(day: date) -> dict[str, str]:
    """Return each code of strftime as it is written for midnight of a day, in English."""
    when, month, weekday = datetime(day.year, day.month, day.day), MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    names = {"%B": month, "%b": month[:3], "%h": month[:3], "%A": weekday, "%a": weekday[:3], "%p": "AM"}
    numbers = {f"%{code}": when.strftime(f"%{code}") for code in "YmdyHIMSjwUW"}
    short = {f"%-{code}": str(int(numbers[f"%{code}"])) for code in "dmyHIMSj"}
    whole = {"%F": f"{day:%Y-%m-%d}", "%D": f"{day:%m/%d/%y}", "%x": f"{day:%m/%d/%y}", "%T": "00:00:00", "%X": "00:00:00",
             "%R": "00:00", "%Z": "UTC", "%z": "+0000", "%e": f"{day.day:2d}"}  # fmt: skip
    return {**short, **names, **numbers, **whole, "%%": "%"}


def turn_end(tokenizer: Any, chat: Chat) -> TurnEnd:
    """Return what ends an answer under a chat template: its end-of-turn token or text; where it writes none, the beginning of the
    next turn's header. Nothing is taken from the rows."""
    write = Renderer(tokenizer, chat, "").write
    turns = [{"role": "user", "content": QUESTION_MARKER}, {"role": "assistant", "content": MARKER}]
    try:
        after = write(turns).rpartition(MARKER)[2]
        if not after.strip():
            longer = write([*turns, {"role": "user", "content": QUESTION_MARKER}])
            after = longer.rpartition(MARKER)[2].partition(QUESTION_MARKER)[0]
    except Refused:  # of such turns; the limit ends the answer, or an eos token does
        return TurnEnd()
    if not after.strip():
        return TurnEnd()
    return end_in(tokenizer, after)


def end_in(tokenizer: Any, text: str) -> TurnEnd:
    """Return what ends a text that is followed by `text`: its first token that is a mark of its own, or else the whole."""
    own = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    marks = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in own]
    return TurnEnd(tokens=frozenset(marks[:1])) if marks else TurnEnd(texts=(text.rstrip(),))


def own_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that mark something by themselves, such as the end of a turn."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values())


def first_end(text: str, marks: Iterable[str]) -> int:
    """Return how much of the text behind an answer ends it: up to the end of its first mark, else all but blanks at its end, or
    these alone."""
    ends = [(at, -len(mark)) for mark in marks if (at := text.find(mark)) >= 0]
    if ends:
        at, length = min(ends)
        return at - length
    return len(text.rstrip()) or len(text)


def cut(text: str, ends: Iterable[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def same(rendered: str, text: str) -> bool:
    """Return whether a template wrote this text: white space may differ, and it may be escaped as HTML or JSON."""
    wanted = _dense(text)
    return any(_dense(form) == wanted for form in _forms(rendered))


def _holds(rendered: str, text: str) -> bool:
    """Return whether this text stands in what a template wrote; of an earlier answer, its thought may be left out."""
    forms = [_dense(form) for form in _forms(rendered)]
    texts = {_dense(text), _dense(re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL))}
    return any(wanted in form for form in forms for wanted in texts)


def _forms(rendered: str) -> Iterable[str]:
    yield rendered
    if "&" in rendered:
        yield html.unescape(rendered)
    if "\\" in rendered:
        try:
            yield str(json.loads(f'"{rendered}"', strict=False))
        except ValueError:
            yield re.sub(r"\\(u[0-9a-fA-F]{4}|.)", _unescaped, rendered)


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    return chr(int(code[1:], 16)) if len(code) == 5 else {"n": "\n", "t": "\t", "r": "\r"}.get(code, code)


def _dense(text: str) -> str:
    return "".join(text.split())


def _end_of(rendered: str, text: str) -> int:
    """Return where the last occurrence of a turn's text ends; where it was changed, the end of what was rendered."""
    told = text if text in rendered else text.strip()
    at = rendered.rfind(told)
    return at + len(told) if at >= 0 else len(rendered)


def _repeats(said: str, turns: Sequence[Turn]) -> bool:
    """Return whether an error repeats words of a row."""
    texts = [" ".join(turn["content"].split()) for turn in turns]
    return any(text[i : i + 12] in said for text in texts for i in range(max(1, len(text) - 11)))
