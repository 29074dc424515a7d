# `make` alone lists the targets. Each sets up .venv itself, from requirements.txt at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

# A variable given on the command line reaches the program through its environment, unexpanded, as the text it is;
# one that happens to be in the environment does not count.
given = $(filter command,$(firstword $(origin $(1))))
text = $(if $(call given,$(1)),$(value $(1)))
unexport DATA OUT QUICK FROM RUNS
MAKEOVERRIDES :=
export RUN_DATA := $(call text,DATA)
export RUN_OUT := $(call text,OUT)
export RUN_FROM := $(call text,FROM)
export RUN_RUNS := $(call text,RUNS)
ARG_DATA := $(if $(call given,DATA),--data "$$RUN_DATA")
ARG_OUT := $(if $(call given,OUT),--out "$$RUN_OUT")
NO := 0 no false off
QUICK_GIVEN := $(if $(call given,QUICK),$(QUICK),$(if $(call given,DATA),0,1))
ARG_QUICK := $(if $(filter-out $(NO),$(QUICK_GIVEN)),--quick)

.PHONY: help run test lint report notebooks html page bench clean

help:
	@echo 'make run [DATA=PATH] [QUICK=1|0] [OUT=runs]  data (without DATA drawn scenes) -> three notebooks -> scores -> report'
	@echo 'make page [PORT=8000]                        the networks of weights/ as a page in the browser, on localhost'
	@echo 'make html [FROM=FOLDER]                      the executed notebooks as pages that load and run nothing'
	@echo 'make test | lint                             the whole test suite; the linter'
	@echo 'make report [RUNS=FOLDER]                    the committed report and the tables, from report/results'
	@echo 'make notebooks | bench                       execute the committed notebooks anew; measure speed'
	@echo 'make clean                                   remove .venv'

run: .venv/installed
	@$(BIN)/python notebooks/run_all.py $(ARG_OUT) $(ARG_DATA) $(ARG_QUICK)

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# From the committed report/results/; with RUNS=FOLDER from a finished run, whose results it first copies there.
report: .venv/installed
	$(BIN)/python report/build.py $(if $(call given,RUNS),--runs "$$RUN_RUNS")

# Execute the committed notebooks again, on drawn scenes, and keep their outputs.
notebooks: .venv/installed
	$(BIN)/python notebooks/run_all.py --quick --update

# The executed notebooks as pages that need neither Jupyter nor W&B; with FROM=FOLDER, those of a run (runs/x/notebooks).
html: .venv/installed
	$(BIN)/python notebooks/render.py --out "$${RUN_OUT:-runs}/html" $(if $(call given,FROM),"$$RUN_FROM"/*.ipynb)

# Needs the packages for export; PORT=8000 names another port.
page: .venv/installed
	$(PIP) --quiet onnx onnxscript onnxruntime
	$(BIN)/python -m unetseg page weights/unet-camvid7.safetensors weights/unet-camvid11.safetensors \
		weights/unet-drawn.safetensors --out runs/page --serve $(or $(PORT),8000)

# What a user chooses by, about ten minutes on two cores; the README's table.
bench: .venv/installed-dev
	for name in preprocessing training predict; do $(BIN)/python benchmarks/$$name.py || exit; done
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
