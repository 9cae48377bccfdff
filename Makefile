# On a fresh clone: `make demo` renders the comparison, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS := -n logical --maxprocesses 4

.PHONY: demo test test-slow lint solvers clean

demo: .venv/installed-train
	HF_HUB_OFFLINE=1 $(BIN)/dywspan demo --output demo/emoji-sd.png --json demo/emoji-sd.json
	HF_HUB_OFFLINE=1 $(BIN)/dywspan demo --model examples/emoji-flow --output demo/emoji-flow.png --json demo/emoji-flow.json

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS)

test-slow: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# How the learned solvers of examples/ are made.
DISTILL := HF_HUB_OFFLINE=1 $(BIN)/dywspan distill --config training/configs
solvers: .venv/installed-train
	$(DISTILL)/emoji_sd_dyweight.yaml
	$(DISTILL)/emoji_sd_spanlift.yaml
	$(DISTILL)/emoji_sd_spanlift.yaml --steps 7 --lr 3e-4 --updates 600 --evaluate-every 100
	$(DISTILL)/emoji_sd_continuous.yaml
	$(DISTILL)/emoji_sd_dyweight.yaml --steps 2 --teacher-order 4 --teacher-steps 200 --pairs 256 --loss rmse \
		--output build/emoji-sd-any-steps
	$(DISTILL)/emoji_sd_continuous_lift.yaml
	$(DISTILL)/emoji_sd_guided.yaml
	$(DISTILL)/emoji_flow_dyweight.yaml
	$(DISTILL)/emoji_flow_least_squares.yaml
	$(DISTILL)/emoji_flow_spanlift.yaml
	$(DISTILL)/emoji_flow_continuous.yaml
	$(DISTILL)/emoji_flow_dyweight.yaml --steps 2 --teacher-order 4 --teacher-steps 200 --pairs 128 --held-out 48 \
		--loss rmse --output build/emoji-flow-any-steps
	$(DISTILL)/emoji_flow_continuous_lift.yaml

.venv/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build demo
