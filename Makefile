# On a fresh clone: `make demo` renders the comparison, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS := -n logical --maxprocesses 4

.PHONY: demo test test-slow lint docs space clean emoji-sd emoji-flow solvers \
	solvers-emoji-sd any-emoji-sd solvers-emoji-flow any-emoji-flow

demo: .venv/installed-train
	HF_HUB_OFFLINE=1 $(BIN)/dywspan demo --output demo/emoji-sd.json
	HF_HUB_OFFLINE=1 $(BIN)/dywspan demo --model examples/emoji-flow --output demo/emoji-flow.json

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS)

test-slow: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m "slow and not weekly"

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The compare app with all that it needs, as a Hugging Face Space: see docs/app.md.
space:
	rm -rf build/space
	mkdir -p build/space/examples
	cp -r examples/space/. dywspan build/space
	cp -r examples/emoji-* build/space/examples
	find build/space -name __pycache__ -prune -exec rm -r {} +

# How the pipelines and solvers of examples/ are made, into build/: `make emoji-sd` trains that pipeline from nothing,
# then its solvers; `make solvers` learns all that ship for the pipelines as they ship. Re-run a goal to resume. On CPUs:
#   make emoji-flow LAUNCH="ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2"
LAUNCH ?= $(BIN)/accelerate launch
MODEL := # the configurations' own; not the environment's
OUT := build
PRETRAIN := $(LAUNCH) training/pretrain_emoji.py
DISTILL = HF_HUB_OFFLINE=1 $(LAUNCH) training/distill.py $(MODEL) --config training/configs
# TimeLift's peak rate falls with the number of steps: a run for each.
TIMELIFT_SD := "1 2 3 --lr 5e-3" "4 --lr 3e-3" "5 --lr 1.5e-3"
TIMELIFT_FLOW := "1 2 3 --lr 1e-2" "4 --lr 5e-3" "5 --lr 3e-3"
# The last line of a recipe: how long the goal took, and on which CPU.
START := $(shell date +%s)
TOOK = @echo "$@: $$((($$(date +%s) - $(START)) / 60)) minutes on $$(nproc) CPU cores, $$(lscpu | sed -n 's/^Model name: *//p')"

emoji-sd: .venv/installed-train
	$(PRETRAIN) sd --mixed-precision bf16
	$(MAKE) solvers-emoji-sd MODEL="--model build/emoji/emoji-sd" OUT=build/emoji
	$(TOOK)

emoji-flow: .venv/installed-train
	$(PRETRAIN) flow --mixed-precision bf16 --autoencoder examples/emoji-sd --compile --updates 3600 --word-updates 800
	$(MAKE) solvers-emoji-flow MODEL="--model build/emoji/emoji-flow" OUT=build/emoji
	$(TOOK)

solvers: solvers-emoji-sd any-emoji-sd solvers-emoji-flow any-emoji-flow
	$(TOOK)

solvers-emoji-sd: .venv/installed-train
	$(DISTILL)/emoji_sd_dyweight.yaml --output $(OUT)/emoji-sd-solvers
	$(DISTILL)/emoji_sd_spanlift.yaml --base $(OUT)/emoji-sd-solvers --output $(OUT)/emoji-sd-spanlift
	$(DISTILL)/emoji_sd_spanlift.yaml --base $(OUT)/emoji-sd-solvers --output $(OUT)/emoji-sd-spanlift \
		--steps 7 --lr 3e-4 --updates 600 --evaluate-every 100
	for run in $(TIMELIFT_SD) "7 --lr 1e-3 --updates 120"; do $(DISTILL)/emoji_sd_timelift.yaml \
		--base $(OUT)/emoji-sd-solvers --output $(OUT)/emoji-sd-timelift --steps $$run || exit; done
	$(DISTILL)/emoji_sd_spanlift.yaml --base $(OUT)/emoji-sd-timelift --output $(OUT)/emoji-sd-spanlift-timelift \
		--steps 1 2 3 --loss rmse --updates 80 --evaluate-every 20

any-emoji-sd: .venv/installed-train
	$(DISTILL)/emoji_sd_continuous.yaml
	$(DISTILL)/emoji_sd_dyweight.yaml --steps 2 --teacher-order 4 --teacher-steps 200 --pairs 256 --loss rmse \
		--output build/emoji-sd-any-steps
	$(DISTILL)/emoji_sd_continuous_lift.yaml
	$(DISTILL)/emoji_sd_guided.yaml
	$(DISTILL)/emoji_sd_guided.yaml --variants '{}' --guidance-scale 4 --updates 160 --evaluate-every 20 \
		--output build/emoji-sd-guidance-4

solvers-emoji-flow: .venv/installed-train
	$(DISTILL)/emoji_flow_dyweight.yaml --output $(OUT)/emoji-flow-solvers
	$(DISTILL)/emoji_flow_least_squares.yaml --output $(OUT)/emoji-flow-solvers
	$(DISTILL)/emoji_flow_spanlift.yaml --base $(OUT)/emoji-flow-solvers --output $(OUT)/emoji-flow-spanlift
	$(DISTILL)/emoji_flow_spanlift.yaml --base $(OUT)/emoji-flow-solvers --output $(OUT)/emoji-flow-spanlift \
		--steps 7 --lr 5e-4 --updates 120
	for run in $(TIMELIFT_FLOW) "7 --lr 2e-3 --updates 120"; do $(DISTILL)/emoji_flow_timelift.yaml \
		--base $(OUT)/emoji-flow-solvers --output $(OUT)/emoji-flow-timelift --steps $$run || exit; done
	$(DISTILL)/emoji_flow_spanlift.yaml --base $(OUT)/emoji-flow-timelift --output $(OUT)/emoji-flow-spanlift-timelift \
		--steps 1 2 3 --loss rmse --updates 80 --evaluate-every 20

any-emoji-flow: .venv/installed-train
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
