PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test quickstart real-text lint clean

# torch goes first and alone: the constrained version resolves to a CPU build where one is at hand.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .

quickstart: $(STAMP)
	$(BIN)/hydra-ppo quickstart $(ARGS)

real-text: $(STAMP)
	$(BIN)/python examples/real_text/run.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
