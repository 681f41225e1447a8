# Two commands do everything: `make run` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Where torch comes from. On a machine with neither GPU nor disk to spare, the CPU build is smaller:
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help run test lab site bench check clean
help:            ## show this list
	@grep -hE '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "clinllm needs Python 3.11 or 3.12, this is %d.%d. Try: make run PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

run: $(READY)    ## install, fetch the default model, run every experiment, build the site
	@clinllm run; failed=$$?; clinllm site && exit $$failed

test: $(READY)   ## install, run the notebook tests and pytest
	nbdev-test --n-workers 2 --do-print
	python -m pytest -q

# JupyterLab asks another host for news and updates unless it is told not to.
lab: $(READY)    ## open JupyterLab on nbs/index.ipynb
	jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

site: $(READY)   ## build the site from the newest runs and serve it
	clinllm site --serve

# BENCH holds options of bench_import.py, such as BENCH="--patients 1000 --ours-only '' --peers none" for two minutes instead of half an hour.
bench: $(READY)  ## time clinllm against its peers on the same work, as ratios
	python tests/bench/bench_scoring.py
	python tests/bench/bench_evaluation.py
	python tests/bench/bench_import.py $(BENCH)

check: $(READY)  ## is the library in step with its notebooks, and are the notebooks clean?
	nbdev-export && nbdev-clean && git diff --stat --exit-code -- nbs clinllm

clean:           ## remove reports and the environment; downloads in data/cache stay
	rm -rf reports/*/ $(VENV) *.egg-info build dist
