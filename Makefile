# Two commands on a fresh machine: `make demo` and `make test`. Each does its own set-up.
PYTHON ?= python3
VENV ?= .venv
# a CPU build is enough; put your own CUDA build here if you have a GPU
TORCH ?= torch==2.13.0
OUT ?= demo-output
# processes of the fast tests, one thread each: most of their work is too small to share among threads
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-comfyui test-browser lint clean

$(VENV)/.ready: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet -e ".[headless,test]"
	touch $@

demo: $(VENV)/.ready
	$(VENV)/bin/python -m realera_nodes demo --out $(OUT)

test: $(VENV)/.ready
	$(VENV)/bin/pip install --quiet -e ".[studio]"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile

test-comfyui: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q -m comfyui

test-browser: $(VENV)/.ready
	$(VENV)/bin/pip install --quiet -e ".[browser]"
	$(VENV)/bin/python -m pytest -q -m browser

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(OUT)
