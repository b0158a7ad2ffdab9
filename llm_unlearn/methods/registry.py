"""The ways to forget that are not one loss: the union is what a recipe's `method`, the schema and the tests follow."""

from __future__ import annotations

from llm_unlearn.methods.retrain import Retrain

AnyMethod = Retrain
