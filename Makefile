# `make demo` and `make test` set up everything they need in a virtual environment of their own.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
# Tests run in a process per core, of which many would only add to the seconds that each takes to start.
# PYTEST_ARGS come last: "-n 0 tests/test_cli.py" runs a file in one process.
PYTEST := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest
IN_PROCESSES := -n logical --maxprocesses 8 --dist worksteal

.PHONY: help demo demo-segmentation demo-detection demo-any-speed demo-web demo-space test test-all test-common test-slow test-official bench speed gpu-check pages cards style quality clean

help:
	@echo "make demo              fine-tune, publish, load and compare pruned models on cluttered digits"
	@echo "make demo-segmentation the same for label maps"
	@echo "make demo-detection    the same for boxes and masks of objects"
	@echo "make demo-any-speed    one checkpoint at any speed, against one checkpoint per speed"
	@echo "make demo-web          the pruned model of the demo on a page that runs in your browser"
	@echo "make demo-space        a page in the browser that shows the model of make demo, as a Space on the Hub would"
	@echo "make test              every feature once: less than five minutes on two cores, without a network"
	@echo "make test-all          all tests for a CPU, every model in every configuration: half an hour on two cores"
	@echo "make test-common       the model test suite of the installed Transformers release"
	@echo "make test-slow         tests that take more than a minute each"
	@echo "make test-official     the official example scripts, in TRANSFORMERS_EXAMPLES=.../transformers/examples/pytorch"
	@echo "make bench             ViT-L/16: Cropr against the unpruned model, a random pruner, Transformers' and timm's ViT"
	@echo "make speed             all measurements of docs/speed.md and schedules.md: more than an hour on a machine that does nothing else"
	@echo "make gpu-check         everything that needs a GPU, in at most eight minutes, by the Python in PYTHON as it is"
	@echo "make pages             tables and pictures of README and docs/ from their records"
	@echo "make cards             model_cards/ from the records of the demos and from the recipes"
	@echo "make style             format and fix"
	@echo "make quality           ruff and mypy"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One installation per set of extras, again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python examples/demo.py

demo-segmentation: $(VENV)/.installed-demo
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python examples/demo.py --task semantic_segmentation \
		--train_images 10000 --epochs 2 --output_dir outputs/demo_segmentation

demo-detection: $(VENV)/.installed-demo
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python examples/demo.py --task instance_segmentation \
		--train_images 6000 --output_dir outputs/demo_detection

demo-any-speed: $(VENV)/.installed-demo
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python examples/any_speed.py

# Libraries of the page; their packages run nothing when they are installed.
WEB := examples/web/node_modules/.installed
$(WEB): examples/web/package.json
	npm install --silent --ignore-scripts --no-audit --no-fund --no-package-lock --prefix examples/web
	@touch $@

demo-web: $(VENV)/.installed-export $(WEB) outputs/demo/cropr/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python examples/web/build_page.py --serve

# Minutes, once.
outputs/demo/cropr/config.json:
	$(MAKE) demo

demo-space: $(VENV)/.installed-space outputs/demo/cropr/config.json
	HF_HUB_OFFLINE=1 CROPR_MODELS=outputs/demo/cropr $(BIN)/python examples/space/app.py

test: $(VENV)/.installed-dev
	$(PYTEST) $(IN_PROCESSES) $(PYTEST_ARGS)

# Without npm, or without a network for it, tests of the page are skipped.
test-all: $(VENV)/.installed-dev
	-$(if $(shell command -v npm),@$(MAKE) --no-print-directory $(WEB))
	$(PYTEST) $(IN_PROCESSES) -m "not slow and not gpu and not common" $(PYTEST_ARGS)

test-common: $(VENV)/.installed-dev
	$(BIN)/python tests/transformers_common/fetch.py
	$(PYTEST) -m common tests/transformers_common $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-official: $(VENV)/.installed-dev
	$(if $(TRANSFORMERS_EXAMPLES),,$(error Set TRANSFORMERS_EXAMPLES, see docs/official_scripts.md))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check albumentations torchmetrics pycocotools
	TRANSFORMERS_EXAMPLES=$(abspath $(TRANSFORMERS_EXAMPLES)) \
		$(PYTEST) -m slow tests/test_official_scripts.py $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/cropr-hf benchmark --size large --pruning_rate 8 --batch_size 8 --references

speed: $(VENV)/.installed-dev
	$(BIN)/python docs/speed/measure.py
	$(MAKE) pages

# In no environment of its own: a machine with a GPU has a torch that fits it, and may have no network.
GPU_RECORDS ?= docs/speed/gpu
gpu-check:
	PYTHONPATH=. $(PYTHON) docs/speed/gpu_check.py $(GPU_RECORDS)

pages: $(VENV)/.installed-dev
	$(BIN)/python docs/render.py

cards: $(VENV)/.installed-dev
	$(BIN)/python model_cards/render.py

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache .cache
