"""Settings that a chat template reads besides the turns of a conversation."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import field, replace

from llm_unlearn.spec import spec

DATE = "2024-07-26"
"""The date that templates print unless a setting says another: the one that Llama 3.1's template falls back to."""
OWN = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize", "date_string", "enable_thinking")
"""Template arguments that other settings stand for, or that the rows themselves give."""


@spec
class Chat:
    """Settings of the chat template. A source or set inherits what it does not set from the section `chat` of its
    recipe or suite."""

    system: str | None = None
    """System turn of rows that bring none, such as `You are a helpful assistant.`"""
    thinking: bool | None = None
    """Passed to the template as `enable_thinking`; null leaves it to the template."""
    date: str | None = None
    """Date that the template prints, as YYYY-MM-DD, so that the clock never changes a run. Null: that of the section, 2024-07-26
    unless it says another."""
    arguments: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Further arguments of the template, such as `{reasoning_effort: low}`."""

    def over(self, section: Chat) -> Chat:
        """Return these settings, with those of `section` where they are not set."""
        return replace(
            self,
            system=section.system if self.system is None else self.system,
            thinking=section.thinking if self.thinking is None else self.thinking,
            date=self.date or section.date or DATE,
            arguments={**section.arguments, **self.arguments},
        )

    @property
    def day(self) -> datetime.date:
        """The date that the template prints."""
        return datetime.date.fromisoformat(self.date or DATE)


def chat_problems(chat: Chat) -> Iterable[tuple[tuple[str, ...], str]]:
    """Yield (keys, text) for each setting that cannot be used."""
    try:
        chat.day  # noqa: B018
    except ValueError:
        yield ("date",), f"found {chat.date!r}; expected a date such as {DATE}."
    if chat.system is not None and not chat.system.strip():
        yield ("system",), "must not be blank. Set null for no system turn."
    for name in chat.arguments.keys() & set(OWN):
        instead = {"date_string": "Set chat.date.", "enable_thinking": "Set chat.thinking."}.get(name, "Take it out.")
        yield ("arguments", name), f"is set by other means. {instead}"
