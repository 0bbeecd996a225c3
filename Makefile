# `make demo` and `make test` need only Python 3.11+ and a package index; both use the one .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test study figures lock clean

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/installed
	$(BIN)/python calculate_dp.py configs/tiny.yaml
	$(BIN)/python train_bi.py configs/tiny.yaml
	$(BIN)/python train_ubmoe.py configs/tiny.yaml
	$(BIN)/python -m ubmoe.results table configs/tiny.yaml

# The whole study on the embedded model, three seeds; goes on where it stopped.
study: .venv/installed
	$(BIN)/python -m ubmoe.results run configs/tiny.yaml results.table=all
	$(BIN)/python -m ubmoe.results figure configs/tiny.yaml
	$(BIN)/python -m ubmoe.results table configs/tiny.yaml results.table=all

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Pictures of the pages that are redrawn by our own code.
figures: .venv/installed
	$(BIN)/python -m ubmoe.report.diagram image/checkpoints.png
	$(BIN)/python calculate_dp.py configs/tiny.yaml
	cp runs/tiny/dependence_map.png image/dp.png

# One torch build for every platform and no accelerator packages: pip and uv resolve those from torch's own metadata.
lock:
	echo "torch==2.13.0" > .torch-pin
	uv pip compile pyproject.toml --extra dev --constraint .torch-pin --universal --python-version 3.11 \
		--no-annotate --no-header --quiet $(LOCK_OPTIONS) --output-file .resolved
	grep -vE '^(torch|triton|nvidia-|cuda-)' .resolved > requirements.lock
	echo "torch==2.13.0" >> requirements.lock
	LC_ALL=C sort -o requirements.lock requirements.lock
	rm .torch-pin .resolved

clean:
	rm -rf .venv runs
