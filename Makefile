# One target per stage. PIPELINE is a name under pipelines/ or the path of a YAML; ARGS are overrides (key.path=value).
PIPELINE ?= demo
ARGS ?=
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP = $(RUN) -m pip install --disable-pip-version-check --no-compile -qq -c constraints.txt

# Bytecode is cached on first import, inside .venv: stages start in half the time, and nothing is written elsewhere.
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup corpus featurize pretrain vpt finetune evaluate probe probe-tasks report compare app verify demo sweep teachers bench study codecs \
	test lint clean

help:  ## this list
	@echo "make STAGE [PIPELINE=demo|photos|path/to.yaml] [ARGS=\"key.path=value …\"]"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'

# Everything is pinned by constraints.txt; compiling all of it up front would double the installation.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing into $(VENV): a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

setup: $(VENV)/ready  ## make .venv with everything in it

corpus: setup  ## pack, adopt or render the corpora (contract 1)
	$(RUN) -m pipelines corpus $(PIPELINE) $(ARGS)

featurize: setup  ## compute every teacher's features once, into the target store (contract 2)
	$(RUN) -m featurize run $(PIPELINE) $(ARGS)

pretrain: setup  ## train projector, task tokens and predictors against the stored targets
	$(RUN) -m train pretrain $(PIPELINE) $(ARGS)

vpt: setup  ## optional second stage: captions, whole language model
	$(RUN) -m train vpt $(PIPELINE) $(ARGS)

finetune: setup  ## instruction tuning
	$(RUN) -m train finetune $(PIPELINE) $(ARGS)

probe: setup  ## what each layer knows: one probe per layer, before and after
	$(RUN) -m train probe $(PIPELINE) $(ARGS)

probe-tasks: setup  ## depth order, mIoU, generated images: the probes' predictions through the teachers' own decoders
	$(RUN) -m pipelines probe-tasks $(PIPELINE) $(ARGS)

evaluate: setup  ## CV-Bench, MMStar
	$(RUN) -m pipelines evaluate $(PIPELINE) $(ARGS)

report: setup  ## one self-contained page: runs/<pipeline>/report.html
	$(RUN) -m pipelines report $(PIPELINE) $(ARGS)

compare: setup  ## runs side by side, one self-contained page: ARGS="runs/demo runs/other"
	$(RUN) -m pipelines compare $(ARGS)

app: setup  ## a local page: an image, a question, the answer, what the layers see
	$(RUN) -m pipelines app runs/$(PIPELINE)/finetune/model --layers-of runs/$(PIPELINE)/pretrain/model $(ARGS)

verify: setup  ## check every stored target against its checksum and the corpus
	$(RUN) -m featurize verify $(PIPELINE) $(ARGS)

demo: setup  ## the whole pipeline on this computer, in minutes
	$(RUN) -m pipelines run $(PIPELINE) $(ARGS)

sweep: setup  ## many settings on one store, one table: ARGS="--over KEY VALUE VALUE"
	$(RUN) -m pipelines sweep $(PIPELINE) $(ARGS)

teachers: setup  ## train the demo world's teachers and student base from nothing, print their gates
	$(RUN) -m pipelines teachers $(ARGS)

bench: setup  ## measured ratios: stored targets against teachers online, our featurization and loader against others'
	$(RUN) -m pipelines bench $(ARGS)

study: setup  ## many students by a protocol fixed beforehand: tables, a figure, a verdict (hours; go on where it stopped)
	$(RUN) -m pipelines study $(ARGS)

codecs: setup  ## what storing targets in fewer bits costs, and what it does to a student
	$(RUN) -m pipelines codecs $(ARGS)

test: setup  ## the tests, three files at a time
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup  ## ruff, mypy, import-linter
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

clean:  ## remove runs/$(PIPELINE)
	rm -rf runs/$(PIPELINE)
