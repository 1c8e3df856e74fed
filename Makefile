# Everything runs in .venv at the root, made on first use and made anew when Python or the pinned versions change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell ($(PYTHON) --version; cat pyproject.toml constraints.txt setup.py src/coatnet/native/*.h src/coatnet/native/*.cpp) | cksum | cut -d' ' -f1)
DEMO := demo

.PHONY: demo test test-slow check format clean

$(READY):
	$(BIN)/python --version 2>&1 | grep -qxF "$$($(PYTHON) --version)" || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	rm -f $(VENV)/.ready-*
	touch $@

demo: $(READY)  ## train on 4,000 real pictures, evaluate, predict
	rm -rf $(DEMO)/pictures
	$(BIN)/python -m coatnet.data.embedded $(DEMO)/pictures
	$(BIN)/coatnet train $(DEMO)/pictures --out $(DEMO)/run --overwrite --max-time 150s
	$(BIN)/coatnet eval $(DEMO)/run $(DEMO)/pictures
	$(BIN)/coatnet predict $(DEMO)/run '$(DEMO)/pictures/test/*/000*0.png' --k 1
	@echo "Open $(DEMO)/run/report.html in a browser."

test: check  ## the whole suite but the slow part
	$(BIN)/python -m pytest -m 'not slow'

test-slow: check  ## everything, hours included
	$(BIN)/python -m pytest

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check src tests tools
	$(BIN)/ruff check src tests tools
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format src tests tools
	$(BIN)/ruff check --fix src tests tools

clean:
	rm -rf $(VENV) $(DEMO) runs build .pytest_cache .ruff_cache .hypothesis
