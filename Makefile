# make demo   the first crossing, with the shipped models
# make test   all tests, lint and types
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test results readme sweep bench proto clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

venv: $(VENV)/.ready  ## create .venv from pyproject.toml and constraints.txt

demo: venv  ## draw scenes, cross an emulated 10 Mbit/s uplink in several recipes, show what each cost
	$(BIN)/kvferry demo --out out/demo.png

test: venv  ## lint, types and tests
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

sweep: venv  ## the raw results behind RESULTS.md (minutes on 2 quiet cores, resumable)
	$(BIN)/kvferry sweep --model testbed/cloud --check forced --out results/selection-cloud.jsonl
	$(BIN)/kvferry sweep --model testbed/cloud --check forced --out results/scorers-cloud.jsonl --protocols A --n 1000 \
	  --codecs bf16 --lossless '' --fractions 0.5,0.25,0.1,0.05,0.02 --selections \
	  q2c,snapkv,h2o,streaming,random,vlcache,leaveout,knorm,keydiff,value_norm,expected_attention

results: venv  ## RESULTS.md and its figures from the stored raw results
	$(BIN)/kvferry results

readme: venv  ## the README's table and picture, from a run of the demo
	$(BIN)/kvferry demo --out docs/figures/demo.png --into README.md

bench: venv  ## ratios of cost, measured in one run
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/codec.py

proto: venv  ## regenerate src/kvferry/wire from proto/
	$(BIN)/python -m kvferry.wire.generate

clean:  ## remove everything that a command can make again
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
