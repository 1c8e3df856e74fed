# Everything runs in .venv at the root, made on first use and made anew when Python or the pinned versions change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell ($(PYTHON) --version; cat pyproject.toml constraints.txt setup.py src/coatnet/native/*.h src/coatnet/native/*.cpp) | cksum | cut -d' ' -f1)
DEMO := demo
LETTERS := letters
LETTERS_RECIPE := --recipe tiny_pictures --flip-rate 0 --ema-decay 0 --overwrite

STUDIES := generalisation lineage relative-attention capacity data-scale

BENCH_READY := $(VENV)/.bench-ready

.PHONY: demo bench bench-growth bench-int8 studies test test-slow check format clean

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

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

bench: $(BENCH_READY)  ## the table of docs/results.md, in under 20 minutes of 2 quiet cores
	$(BIN)/coatnet bench infer --out results/bench_infer.json
	$(BIN)/coatnet bench train --out results/bench_train.json
	$(BIN)/coatnet bench data --commands --out results/bench_data.json
	$(BIN)/python tools/write_results.py

bench-growth: $(BENCH_READY)  ## the growth plots
	$(BIN)/coatnet bench growth --out results/bench_growth.json --plot docs/growth.png
	$(BIN)/python tools/write_results.py

bench-int8: $(BENCH_READY)  ## train coatnet_0 on letters of the system's typefaces, then compare int8 with fp32
	$(BIN)/python tools/draw_letters.py $(LETTERS)/pictures --train 8 --test 10
	$(BIN)/coatnet train $(LETTERS)/pictures --out $(LETTERS)/run64 --model coatnet_0 --image-size 64 --batch-size 96 --max-time 20m $(LETTERS_RECIPE)
	$(BIN)/coatnet train $(LETTERS)/pictures --out $(LETTERS)/run112 --init $(LETTERS)/run64 --image-size 112 --batch-size 96 --max-time 16m $(LETTERS_RECIPE)
	$(BIN)/coatnet train $(LETTERS)/pictures --out $(LETTERS)/run224 --init $(LETTERS)/run112 --image-size 224 --batch-size 64 --max-time 16m $(LETTERS_RECIPE)
	$(BIN)/coatnet bench agreement $(LETTERS)/run224 $(LETTERS)/pictures --out results/bench_agreement.json
	$(BIN)/python tools/write_results.py

studies: $(READY)  ## the tables and pictures of docs/findings.md; goes on where it was ended
	for study in $(STUDIES); do \
	  $(BIN)/coatnet study $$study --out studies && \
	  cp studies/$$study-small.json results/study_$$(echo $$study | tr - _).json && \
	  cp studies/$$study-small.png docs/study_$$(echo $$study | tr - _).png || exit 1; \
	done
	$(BIN)/python tools/write_results.py

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
	rm -rf $(VENV) $(DEMO) $(LETTERS) runs build src/coatnet/native/*.so .pytest_cache .ruff_cache .hypothesis
