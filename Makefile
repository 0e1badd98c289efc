# LocVLM: `make demo` and `make test` need nothing but Python 3.11 or 3.12.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DVC    := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc
# a folder of wheels that pip is configured with holds for uv too
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_COMPILE_BYTECODE ?= 1
export PYTHONUNBUFFERED := 1
export OMP_NUM_THREADS ?= 1

# make demo DATA=instances.json IMAGES=folder PRESET=tiny SET="a.b=c d.e=f"
PRESET ?= tiny
DEMO_ARGS := --preset $(PRESET) $(if $(DATA),--data "$(DATA)") $(if $(IMAGES),--images "$(IMAGES)") $(foreach s,$(SET),--set $(s))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format data ui pipelines bench clean

help: ## list the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## install everything into .venv (demo, test and the others do it by themselves)

$(VENV)/.ready: pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && uv pip install --quiet --python $(BIN)/python -e '.[dev]' -c constraints.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt; \
	fi
	@touch $@

demo: setup $(if $(DATA),,data) ## run the whole pipeline on this machine: data, training, evaluation, registry, report
	@$(BIN)/python -m workflows.run_local $(DEMO_ARGS)

test: setup ## run the tests
	@$(BIN)/python -m pytest

check: setup ## format, lint, types, import walls
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## rewrite the files as `make check` wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

data: setup ## draw the demo scenes that data.dvc pins and put them into the local DVC remote
	@$(BIN)/locvlm data scenes --output data/scenes --seed 0 --n-train 6000 --n-test 800
	@! $(DVC) status --json data.dvc | grep -q '"modified"' || { echo "data/ is not what data.dvc pins; move it away and run this again" >&2; exit 1; }
	@$(DVC) commit --quiet --force data.dvc && $(DVC) push --quiet && $(DVC) status

ui: setup ## open MLflow on the runs of make demo (http://127.0.0.1:5000)
	@$(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath runs/mlflow.db) --host 127.0.0.1 --port 5000

pipelines: setup ## compile the pipeline packages
	@$(BIN)/python -m workflows.compile

bench: setup ## our path against a peer's, same work, results compared first
	@for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean: ## remove runs and caches (not the data, not .venv)
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
