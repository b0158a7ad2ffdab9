"""Make a fine-tuned language model forget given data, measure what is left, and show it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_unlearn.cli import launch, main

if TYPE_CHECKING:
    from llm_unlearn.api import Evaluation, Run, evaluate, load_recipe, make_recipe, open_evaluation, open_run, unlearn
    from llm_unlearn.spec import Refused

__all__ = [
    "Evaluation",
    "Refused",
    "Run",
    "evaluate",
    "launch",
    "load_recipe",
    "main",
    "make_recipe",
    "open_evaluation",
    "open_run",
    "unlearn",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names for programs and notebooks are read when they are asked for: the command line's help must not wait for them."""
    if name in __all__:
        return getattr(import_module("llm_unlearn.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
