"""Other answers to the questions of a set, written by the model itself."""

from llm_unlearn.alternates.request import check
from llm_unlearn.alternates.writing import make

__all__ = ["check", "make"]
