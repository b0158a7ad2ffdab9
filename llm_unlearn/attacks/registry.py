"""The registry of attacks: the union is what a suite file, the schema and the tests follow."""

from __future__ import annotations

from typing import Annotated

from llm_unlearn.attacks.adapter_removal import AdapterRemoval
from llm_unlearn.attacks.gcg import GCG
from llm_unlearn.attacks.layers import ActivationPatching, LayerProbe, LogitLens
from llm_unlearn.attacks.quantization import Quantization
from llm_unlearn.attacks.relearning import Relearning
from llm_unlearn.attacks.rewrites import Rewrites
from llm_unlearn.attacks.routing import ForcedRouting
from llm_unlearn.attacks.shadows import Shadows
from llm_unlearn.attacks.soft_prompt import SoftPrompt
from llm_unlearn.attacks.thoughts import BegunThought, SkippedThought
from llm_unlearn.attacks.two_model import TwoModel
from llm_unlearn.spec import by_name

OnWeights = Relearning | Quantization | AdapterRemoval
OnStates = LogitLens | LayerProbe | ActivationPatching
OnPrompts = SoftPrompt | GCG | Rewrites | TwoModel
OnThoughts = BegunThought | SkippedThought

AnyAttack = Annotated[OnWeights | OnStates | OnPrompts | OnThoughts | Shadows | ForcedRouting, by_name]
