# make run [DATA=PATH] [QUICK=1] [OUT=runs]   raw street scenes -> three trained stages and a report
# make test                                   the whole test suite
# Both set up .venv themselves, from requirements.txt at the versions of constraints.txt.

PYTHON ?= python3
OUT ?= runs
QUICK ?= $(if $(DATA),0,1)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: run test lint report notebooks html bench clean

run: .venv/installed
	@$(BIN)/python notebooks/run_all.py --out "$(OUT)" $(if $(DATA),--data "$(DATA)") $(if $(filter-out 0,$(QUICK)),--quick)

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# From the committed report/results/; with RUNS=FOLDER... from finished runs, whose results it first copies there.
report: .venv/installed
	$(BIN)/python report/build.py $(if $(RUNS),--runs $(RUNS))

# Execute the committed notebooks again, on drawn scenes, and keep their outputs.
notebooks: .venv/installed
	$(BIN)/python notebooks/run_all.py --out runs --quick --update

# The executed notebooks as pages that need neither Jupyter nor W&B; with FROM=FOLDER, those of a run (runs/x/notebooks).
html: .venv/installed
	$(BIN)/python notebooks/render.py --out "$(OUT)/html" $(if $(FROM),"$(FROM)"/*.ipynb)

# The shorter benchmarks, about ten minutes on two cores; the README's table. See benchmarks/ for those that take longer.
bench: .venv/installed-dev
	for name in preprocessing training inference start; do $(BIN)/python benchmarks/$$name.py --home "$(OUT)/bench" || exit; done
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf .venv

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; name another one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) --requirement requirements.txt
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
		echo "import cv2 fails (no libGL here?): taking the headless OpenCV instead"; \
		$(BIN)/python -m pip uninstall --quiet --yes opencv-python; $(PIP) opencv-python-headless; }
	@$(BIN)/python -c 'import cv2'
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) --requirement requirements-dev.txt
	@touch $@
