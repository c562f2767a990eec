# Everything sets itself up: only python3 and pip are assumed.
PYTHON ?= python3
DATA ?=
SUITES ?= cpu,ceiling,mask,masked-train,gemm,conv,end-to-end,train,table3
SECONDS ?=
OUT ?= runs/gpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
# Triton 3.6's interpreter takes arrays of one element for numbers, which numpy 2.4 refuses
BESIDE_3.6.0 := 'numpy<2.4'

.PHONY: help test test-slow test-versions lint quickstart bench gpu clean
help:
	@echo "make quickstart [DATA=path]   train dense -> 3:4 -> 2:4, sample, measure; leaves pictures in runs/quickstart*"
	@echo "make test                     lint and the whole default test suite"
	@echo "make test-slow                the tests that take minutes"
	@echo "make test-versions            the kernel tests under each of Triton $(TRITONS); most of an hour"
	@echo "make bench                    measure small shapes here (a CPU will do), draw every chart: runs/bench"
	@echo "make gpu [SECONDS=385 OUT=..] on a GPU: 185 s of first contact, then so long by value: runs/gpu; again: goes on"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,interop,optimizers]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# --dist worksteal: neighbouring tests share what they compile or train, so they run in one process
# the operations of the tests are too small for two threads, and a few compare with one thread bit for bit
test test-slow: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -c "import dadaptation, lion_pytorch, prodigyopt, schedulefree"  # else their tests would be skipped
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# one environment, and each Triton in a folder that is found before the environment's own; the disassembler
# is the environment's, because Triton 3.6.0's cannot decode sm_103
test-versions: export OMP_NUM_THREADS = 1
test-versions: $(TRITONS:%=.venvs/triton-%/.tested)

.venvs/triton-%/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$* $(BESIDE_$*)
	touch $@

.venvs/triton-%/.tested: .venvs/triton-%/.installed FORCE
	PYTHONPATH=$(CURDIR)/$(@D) $(BIN)/python -c "import triton; assert triton.__version__ == '$*', triton.__version__"
	PYTHONPATH=$(CURDIR)/$(@D) $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal emulator/tests tests/kernels tests/bench/test_instruction_rates.py
	TRITON_CUOBJDUMP_PATH="$$($(BIN)/python -c 'from triton import knobs; print(knobs.nvidia.cuobjdump.path)')" \
	PYTHONPATH=$(CURDIR)/$(@D) $(BIN)/python -m tests.kernels.compile_table > $@ && cat $@

.PHONY: FORCE
.PRECIOUS: .venvs/triton-%/.installed

bench: $(STAMP)
	rm -rf runs/bench
	$(BIN)/python -m bench.run --quick --device cpu --suite $(SUITES) --out runs/bench/results.csv
	$(BIN)/python -m bench.plot runs/bench/results.csv --out runs/bench/plots

# no network and no pip: under the Python that has torch and Triton
gpu:
	-$(PYTHON) -m bench.campaign first --out '$(OUT)'
	$(PYTHON) -m bench.campaign second --out '$(OUT)' $(if $(SECONDS),--seconds $(SECONDS))

# threads that wait by sleeping: by spinning, two of them slow down to a crawl as soon as another process is busy
quickstart: export OMP_WAIT_POLICY = PASSIVE
quickstart: $(STAMP)
	$(BIN)/sparsedm quickstart $(if $(DATA),--data '$(DATA)')

clean:
	rm -rf $(VENV) .venvs .pytest_cache .ruff_cache
