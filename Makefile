# On a fresh clone: `make demo` renders the comparison, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint solvers clean

demo: .venv/installed-train
	HF_HUB_OFFLINE=1 $(BIN)/dywspan demo --output demo/demo.png --json demo/demo.json

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# How examples/emoji-sd-solvers and examples/emoji-sd-spanlift were made.
LEARN := HF_HUB_OFFLINE=1 $(BIN)/dywspan distill --model examples/emoji-sd --prompts examples/prompts/emoji-train.txt \
	--cache build/pairs --guidance-scale 4 --no-recompute --mixed-precision bf16
LIFT := $(LEARN) --output build/emoji-sd-spanlift --solver spanlift --base build/emoji-sd-solvers --evaluate-every 30
solvers: .venv/installed-train
	$(LEARN) --output build/emoji-sd-solvers --init euler --steps 3 5 7
	$(LIFT) --steps 3 5
	$(LIFT) --steps 7 --lr 3e-4 --updates 240

.venv/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build demo
