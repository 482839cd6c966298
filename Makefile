# make sweep: benchmark this machine and open a report. make test: every check. Both set themselves up in .venv.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
COLOSSALAI := .venv/.installed-colossalai
TRITON36 := .venv/triton-3.6.0

.PHONY: help setup setup-browser setup-colossalai setup-triton36 sweep benchmark published test lint types layers smoke unit slow slow-codegen slow-few clean

help:
	@echo "make sweep             benchmark what this machine can run, predict 8xH800, write out/quick/report.html"
	@echo "make benchmark         time every op against its peers; on a GPU at a DiT's sizes, else small"
	@echo "make published         predict the presets h800 and blog anew, and write reports/published (KERNELS=folder of op records)"
	@echo "make test              lint, types, import layers, a smoke sweep, tests"
	@echo "make slow              the tests that take minutes"
	@echo "make slow-codegen      those of them that compile the kernels, with triton 3.6.0 too"
	@echo "make slow-few          those of them that take minutes together: campaign, emulation, nodes, traces, tilings"
	@echo "make setup             virtual environment in .venv (the others call it)"
	@echo "make setup-browser     Debian's Chromium, for the tests of the report (needs root)"
	@echo "make setup-colossalai  ColossalAI in that environment, for --engine colossalai and its tests"
	@echo "make setup-triton36    triton 3.6.0 beside the installed one, for the tests that compile with both"
	@echo "make clean             remove .venv and out"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup-browser:
	command -v chromium || { apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium; }

setup-colossalai: $(COLOSSALAI)

# Its own requirements are years old: without --no-deps pip would replace torch.
$(COLOSSALAI): requirements-colossalai.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--requirement requirements-colossalai.txt
	@touch $@

setup-triton36: $(TRITON36)/.installed

# Not in the environment: a test puts this folder first on the path of a process of its own.
$(TRITON36)/.installed: requirements-triton36.txt $(STAMP)
	rm -rf $(TRITON36)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON36) \
		--requirement requirements-triton36.txt
	@touch $@

sweep: setup
	$(BIN)/python bench/sweep.py

benchmark: setup
	@mkdir -p out
	$(BIN)/pytest --benchmark -rs --benchmark-json out/benchmark.json

published: setup
	rm -rf out/published
	$(BIN)/python bench/sweep.py --preset h800 --mode predicted --out out/published/h800
	$(BIN)/python bench/sweep.py --preset blog --mode predicted --out out/published/blog
	$(BIN)/python bench/crossover.py --out docs/crossover.svg
	$(BIN)/python -m longreel.reports.publish out/published/h800 out/published/blog --codegen docs/codegen.md --crossover docs/crossover.json $(if $(KERNELS),--kernels $(KERNELS))

test: lint types layers smoke unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

smoke: setup
	$(BIN)/python bench/sweep.py --preset smoke

# Two files at a time: each worker starts process pools of its own. OpenMP's threads of two workers would spin for each
# other's cores. pytest-timeout ends a test that waits in Python; one that never comes back to it ends here, with its
# process and all stacks, and the others go on.
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -o faulthandler_timeout=360 -o faulthandler_exit_on_timeout=true

slow: setup
	$(BIN)/pytest -m slow

slow-codegen: setup setup-triton36
	$(BIN)/pytest -m slow -n 2 tests/bench/test_codegen.py tests/kernels/test_triton_attention_codegen.py

slow-few: setup
	$(BIN)/pytest -m slow tests/bench/test_campaign.py tests/bench/test_campaign_validate.py tests/bench/test_micro_faults.py \
		tests/bench/test_emulation.py tests/bench/test_emulation_check.py tests/bench/test_predicted.py \
		tests/bench/test_emulated_plans.py tests/bench/test_measured.py tests/bench/test_prepare_speed.py \
		tests/bench/test_micro.py tests/bench/test_rank_device.py \
		tests/kernels/test_triton_rows_tuning.py \
		tests/parallel/test_nodes.py tests/parallel/test_trace.py tests/parallel/test_train_command.py

clean:
	rm -rf .venv out
