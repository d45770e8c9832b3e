# make demo: install and take a first look at the embedded model.   make test: the tests.   make test-ui: those in a browser.   make lab: JupyterLab.
PYTHON ?= python3
BIN := .venv/bin

# two test processes whose waiting threads spin take each other's cores, and several times as long
test test-ui: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-ui check lab docs format clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/dynq run dynq-tiny --target 3.5bpw --quick --out runs/quick

test: .venv/installed
	$(BIN)/python -m pytest tests --ignore=tests/ui -n 2 --dist worksteal

test-ui: .venv/installed
	$(BIN)/python -m pytest tests/ui -rs

check: .venv/installed
	$(BIN)/ruff check dynq widgets tests
	$(BIN)/ruff format --check dynq widgets tests
	$(BIN)/mypy
	$(BIN)/nbstripout --verify notebooks/*.ipynb

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

docs: .venv/installed
	$(BIN)/python docs/build.py

format: .venv/installed
	$(BIN)/ruff check --fix dynq widgets tests
	$(BIN)/ruff format dynq widgets tests

clean:
	rm -rf runs build dist
