# Every target sets itself up in .venv once; a second call starts at once.
#   make train                                    the sample run: generated JPEGs, a small ViT, k-NN before and after
#   make train DATA=DIR PRESET=vit-s-300ep OUT=RUN NPROC=8 ARGS="--batch-size 1024"
PYTHON ?= python3
NPROC ?= auto
PRESET ?= demo
SAMPLE := data/sample
DATA ?= $(SAMPLE)
OUT ?= runs/$(PRESET)
ARGS ?=
MINUTES ?= 10

READY := .venv/ready
PY := .venv/bin/python
# Two tests at a time; but those of the GPU, of which some look at what is free on it, one after another.
TESTS := $(PY) -m pytest -n 2 --dist loadfile
# auto: one process a GPU, one where there is none; the sample's batch of 64 takes 1, 2, 4, 8 … of them.
COUNT = import torch; n = torch.cuda.device_count() or 1; print(1 << n.bit_length() - 1 if "$(PRESET)" == "demo" else n)
PROCESSES = $(if $(filter auto,$(NPROC)),$$($(PY) -c '$(COUNT)'),$(NPROC))

# What DATA needs before it can be read: only the sample is made here.
IMAGES = $(if $(filter $(SAMPLE),$(DATA)),$(SAMPLE)/synthetic.json)

.DEFAULT_GOAL := help
.PHONY: train test test-all soak preview equality bench ablate report doctor gpu-check lint format type clean help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 …" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "installing the dependencies into .venv (several GB, once) …"
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > .venv/requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt -c constraints.txt
	@touch $@

# The generator writes this file last, and completes what an interruption left.
$(SAMPLE)/synthetic.json: | $(READY)
	@$(PY) -m dali_pipes.synthetic --out $(SAMPLE)

# One process needs no torchrun, which would add its own traceback to a wrong flag or a Ctrl-C.
train: | $(READY) $(IMAGES) ## pre-train: DATA=DIR PRESET=demo OUT=RUN NPROC=auto ARGS="--flag value"
	@n=$(PROCESSES); torchrun="-m torch.distributed.run --standalone --nproc-per-node=$$n"; test "$$n" = 1 && torchrun=; \
	exec $(PY) $$torchrun train_ddp.py $(PRESET) --data $(DATA) --out $(OUT) $(ARGS)

test: | $(READY) ## the tests (under 15 minutes on 2 cores)
	@$(TESTS) -m "not gpu and not slow"
	@$(PY) -m pytest -m "gpu and not slow"

test-all: | $(READY) ## the slow ones too (under 40 minutes)
	@$(TESTS) -m "not gpu"
	@$(PY) -m pytest -m gpu

soak: | $(READY) ## a run hit by one fault after another must end as if undisturbed: MINUTES=10
	@$(PY) -m tests.soak --minutes $(MINUTES) $(ARGS)

preview: | $(READY) $(IMAGES) ## views.png: what the recipe does to the images in DATA
	@$(PY) -m dali_pipes.preview --data $(DATA) --out views.png

equality: | $(READY) $(IMAGES) ## how far the views are from torchvision's, on the images in DATA
	@$(PY) -m dali_pipes.equality --data $(DATA) $(ARGS)

lint: | $(READY) ## ruff: rules and format
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: | $(READY) ## ruff: mend what it can
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

type: | $(READY) ## mypy
	@$(PY) -m mypy

bench: | $(READY) ## where the time goes: loader, step, ablation (under 10 minutes); benchmarks/results
	@$(PY) -m benchmarks.loader $(ARGS)
	@$(PY) -m benchmarks.step $(ARGS)
	@$(PY) -m benchmarks.ablation $(ARGS)

ablate: | $(READY) ## what each augmentation costs
	@$(PY) -m benchmarks.ablation $(ARGS)

report: | $(READY) ## one page from all benchmarks/results, and the README's table
	@$(PY) -m benchmarks.report $(ARGS)

doctor: | $(READY) ## what this machine has, and what will be slow or missing on it
	@$(PY) -m benchmarks.doctor

gpu-check: ## GPU tests and short benchmarks with .venv, or PYTHON as it stands; installs nothing
	@python=$(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(PY))),$(PYTHON)); \
	$$python -c 'import nvidia.dali, rich, timm, torch, tyro' 2> /dev/null || \
		{ echo "$$python lacks DALI, rich, timm, torch or tyro; run make train first, or name another: make gpu-check PYTHON=…" >&2; exit 2; }; \
	exec $$python -m benchmarks.gpu_check $(ARGS)

clean: ## remove .venv, sample data and caches; runs stay
	rm -rf .venv data/sample .mypy_cache .ruff_cache views.png
