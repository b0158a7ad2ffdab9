"""`python -m llm_unlearn VERB …` and `accelerate launch -m llm_unlearn VERB …`."""

import sys

from llm_unlearn.cli import main

sys.exit(main())
