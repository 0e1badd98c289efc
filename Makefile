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
.PHONY: help setup demo paper foundation test check format data ui submit schedule bench gpu-check clean

help: ## list the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

paper: setup ## the paper's claims on drawn scenes, several seeds, into docs/results/miniature.md (hours; goes on where it stopped; ARGS)
	@$(BIN)/python -m workflows.paper $(ARGS)

LESSONS := runs/lessons
foundation: setup ## make the tiny foundation that the package ships again, from scratch, in runs/foundation (an hour or more of one core)
	@$(BIN)/locvlm data scenes --output $(LESSONS) --seed 20240618 --n-train 8000 --n-test 1000 --shards
	@$(BIN)/locvlm foundation --annotations $(LESSONS)/instances_train.json --held-out $(LESSONS)/instances_test.json \
	  --images $(LESSONS)/images --output runs/foundation

test: setup ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup ## format, lint, types, import walls
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## rewrite the files as `make check` wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

data: setup ## draw the demo scenes that data.dvc pins and put them into the local DVC remote
	@$(BIN)/locvlm data scenes --output data/scenes --seed 0 --n-train 6000 --n-test 800 --shards
	@! $(DVC) status --json data.dvc | grep -q '"modified"' || { echo "data/ is not what data.dvc pins; move it away and run this again" >&2; exit 1; }
	@$(DVC) commit --quiet --force data.dvc && $(DVC) push --quiet && $(DVC) status

ui: setup ## open MLflow on the runs of make demo (http://127.0.0.1:5000)
	@$(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath runs/mlflow.db) --host 127.0.0.1 --port 5000

# make submit PRESET=locvlm-b PIPELINE=video PRICE=2.5 GPUS=8 ARGS="--data-md5 HASH --argument videos=/mnt/locvlm/videos"
# make schedule CRON="0 3 * * *" PRESET=locvlm-b ARGS="--dvc-file data.dvc --dvc-remote s3://bucket/data"
PLAN := $(BIN)/locvlm plan --preset $(PRESET) $(if $(PRICE),--price $(PRICE)) $(if $(GPUS),--gpus $(GPUS)) $(foreach s,$(SET),--set $(s))
SUBMIT := $(BIN)/python -m workflows.submit $(if $(ENDPOINT),--endpoint "$(ENDPOINT)") --preset $(PRESET) $(foreach s,$(SET),--set $(s))

submit: setup ## tell what a run costs (PRICE of a GPU hour) and send it to KFP (ENDPOINT or KF_PIPELINES_ENDPOINT)
	@$(PLAN)
	@$(SUBMIT) $(if $(PIPELINE),--pipeline $(PIPELINE)) $(ARGS)

schedule: setup ## retrain on KFP whenever data, code or configuration changed (CRON, in UTC)
	@$(PLAN)
	@$(SUBMIT) --schedule "$(or $(CRON),0 3 * * *)" $(ARGS)

bench: setup ## our path against a peer's, same work, results compared first
	@for script in $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

gpu-check: setup ## speed and memory of training at the paper's size on this GPU (skipped without one; ARGS)
	@$(BIN)/python benchmarks/gpu_check.py --output docs/results/gpu.md $(ARGS)

clean: ## remove runs and caches (not the data, not .venv)
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
