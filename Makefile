# Every target sets up what it needs: a Python 3.12+, a virtual environment in
# .venv and the pinned, hashed packages of requirements.lock. JAX=0.12.0.1 puts
# that version in the place of the pinned one, in an environment of its own.
VENV := .venv$(addprefix -jax,$(JAX))
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint docs lock clean

## Train the demo comparison (GQA against MSA) and write its report.
demo: $(READY)
	$(RUN) -m train compare demo

## Run the tests that need no GPU.
test: $(READY)
	$(RUN) -m pytest -n 2 --dist loadfile

## Run the tests that take too long for CI, and need no GPU either.
test-slow: $(READY)
	$(RUN) -m pytest -m 'slow and not gpu' -n 2

## Format check, lint and type check.
lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

## Build the documentation into site/; a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

## Resolve requirements.lock again (needs uv).
lock:
	uv pip compile --universal --python-version 3.12 --generate-hashes \
	  --no-header --no-annotate --extra train --extra dev --extra docs \
	  --constraint .ci/constraints.txt --upgrade pyproject.toml \
	  --output-file requirements.lock

$(READY): requirements.lock pyproject.toml
	@sh .ci/setup $(VENV)
	@$(if $(JAX),$(RUN) -m pip install --quiet --no-deps jax==$(JAX) jaxlib==$(JAX))
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
