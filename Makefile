# `make` alone runs the demo; `make help` lists the targets. A line of help stands behind `##`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= Once upon a time, in a small house by the sea,
SAMPLING ?= --max-tokens 64 --temperature 0.7 --top-k 40 --seed 3
BUNDLE := build/sample-int8
CODE   := $(shell find export gemma_keras edge_demo/bundle -name '*.py')

.PHONY: demo help browser test test-all test-arm64 smoke-arm64 count-arm64 check lint format notebooks clean

demo: $(BUNDLE)/bundle.json  ## export the real Gemma 3 270M, and continue a text with it
	@echo "==> Speaking: edge-demo generate $(BUNDLE) --prompt \"$(PROMPT)\""
	@$(BIN)/edge-demo generate $(BUNDLE) $(SAMPLING) --prompt "$(PROMPT)"

help:  ## list the targets
	@echo 'make TARGET, one of:'
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo 'make demo PROMPT="The capital of France is" continues another text.'

$(BUNDLE)/bundle.json: $(CODE) | $(VENV)/installed-demo
	@echo "==> Exporting: export-onnx sample $(BUNDLE)"
	@$(BIN)/export-onnx sample $(BUNDLE) --overwrite

$(VENV)/installed-demo: pyproject.toml
	@echo "==> Installing what the demo needs (about 2 GB, once)"
	@$(PYTHON) tools/make_venv.py $(VENV) export,sample
	@touch $@

$(VENV)/installed-dev: pyproject.toml
	@echo "==> Installing what development needs (about 4 GB, once)"
	@$(PYTHON) tools/make_venv.py $(VENV) dev
	@touch $@ $(VENV)/installed-demo

# One pytest over five processes: the tests of the Keras side run in three of them, one a backend,
# those of the device in the fourth, everything else in the fifth. See tests/conftest.py.
KERAS_PART = --tx popen//id=$(1)//env:KERAS_BACKEND=$(1)//env:GEMMA_TEST_PART=keras
PARTS := --dist=each -o console_output_style=classic $(foreach backend,jax tensorflow torch,$(call KERAS_PART,$(backend))) \
         --tx popen//id=device//env:GEMMA_TEST_PART=device --tx popen//id=rest//env:GEMMA_TEST_PART=rest
test: $(VENV)/installed-dev  ## run the quick tests on JAX, TensorFlow and PyTorch
	@$(BIN)/pytest $(PARTS) -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/installed-dev  ## run all tests, the slow ones too (tests/slow.py)
	@$(BIN)/pytest $(PARTS) $(PYTEST_ARGS)

# The page is tested in a real browser, where there is one: Debian's.
browser:  ## install Chromium for the tests of the page (Debian, as root)
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

# The device's side on a Raspberry Pi 5 and 4, emulated by qemu: see tools/arm64.
# The bundles are those of tools/arm64/bundles.py.
COUNTED := $(foreach name,sample-int8 sample-int4 armv8.0-int8 armv8.2-int8 armv8.2-int4,build/$(name)/bundle.json)
test-arm64: build/arm64 build/sample-fp32/bundle.json $(COUNTED) build/tiny-bundles/made build/tiny-guard/bundle.json  ## run the device's side on two emulated boards (needs qemu)
	@$(BIN)/python -m tools.arm64 build $(ARM64_ARGS)

# Its short part: the command, on a small bundle, on both processors.
smoke-arm64: build/arm64 build/tiny-bundles/made  ## the short part of test-arm64
	@$(BIN)/python -m tools.arm64 build --part command

# Instructions per token, counted by qemu, beside llama.cpp's: see tools/count_arm64.
count-arm64: $(COUNTED)  ## count instructions per token on two emulated boards (needs qemu)
	@$(BIN)/python -m tools.count_arm64 build $(COUNT_ARGS)

.PHONY: build/arm64
build/arm64: $(VENV)/installed-dev
	@$(BIN)/python -m tools.arm64.user_space $@

build/sample-%/bundle.json: $(CODE) | $(VENV)/installed-demo
	@echo "==> Exporting: export-onnx sample build/sample-$* --recipe $*"
	@$(BIN)/export-onnx sample build/sample-$* --recipe $* --overwrite

define FOR_TARGET
build/$(1)-%/bundle.json: $$(CODE) | $$(VENV)/installed-demo
	@echo "==> Exporting: export-onnx sample build/$(1)-$$* --recipe $$* --target $(1)"
	@$$(BIN)/export-onnx sample build/$(1)-$$* --recipe $$* --target $(1) --overwrite
endef
$(foreach target,armv8.0 armv8.2,$(eval $(call FOR_TARGET,$(target))))

build/tiny-bundles/made: $(CODE) tests/models.py tests/edge_demo/make_bundles.py | $(VENV)/installed-dev
	@echo "==> Exporting the small models of the tests"
	@rm -rf build/tiny-bundles build/tiny-bundles.partial
	@$(BIN)/python -m tests.edge_demo.make_bundles build/tiny-bundles.partial
	@mv build/tiny-bundles.partial build/tiny-bundles
	@touch $@

build/tiny-guard/bundle.json: $(CODE) tests/edge_demo/make_guard.py examples/tune_guard.py examples/guard_prompts.csv | $(VENV)/installed-dev
	@echo "==> Tuning the small guard of the tests"
	@rm -rf build/tiny-guard
	@$(BIN)/python -m tests.edge_demo.make_guard build/tiny-guard

check: lint test-all  ## format, lint and types, then all tests: what CI runs

lint: $(VENV)/installed-dev  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev  ## repair format and lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(VENV)/installed-dev  ## execute the notebooks, and rewrite them with their outputs
	@$(BIN)/python -m tools.notebooks notebooks

clean:  ## remove what these targets made
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
