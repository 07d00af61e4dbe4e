# Every target prepares what it needs first; after `make setup`, plain cargo works as well.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build demo test bench compat memcheck lint data

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## */\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r name what; do printf '  make %-8s %s\n' "$$name" "$$what"; done

# LIBTORCH, CUDA and WANDB reach the script through the environment, as make passes on what its command line sets.
setup:  ## fetch libtorch and cmake, compile the torch bridge; LIBTORCH=/path uses your PyTorch 2.11, CUDA=1 adds CUDA, WANDB=1 W&B
	@scripts/setup.sh

build: setup  ## build the host and all plugins
	cargo build --release

demo: build  ## pretrain CNN-JEPA on real images and show what it has learnt
	scripts/demo.sh

# Tests run the built host and plugins, so these come first, with one that fails on request, in the demo's profile.
test: setup  ## run all tests
	tests/setup.sh
	cargo build --release --workspace
	cargo test --release --workspace
	cargo test --release -p jepa-host --test data -- --ignored
	cargo test --release -p jepa-tests --test tracking -- --ignored

bench: build  ## time PyTorch and jepa-host side by side, input pipelines, the plugin boundary and tracking
	scripts/bench.sh
	cargo build --release --workspace
	cargo bench -p jepa-tests --bench boundary
	cargo bench -p jepa-tests --bench tracking

compat: build  ## train with the same files over a newer libtorch; TORCH=version chooses it
	scripts/compat.sh

memcheck: setup  ## load, train and drop every plugin under valgrind
	cargo build --release --workspace
	scripts/memcheck.sh

lint: setup  ## check formatting, lints and documentation
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps -p jepa-plugin-api

data: build  ## build the full Fashion-MNIST files
	scripts/data.sh
