"""Make a fine-tuned language model forget given data, measure what is left, and show it."""

from llm_unlearn.cli import launch, main

__all__ = ["launch", "main"]
__version__ = "0.1.0"
