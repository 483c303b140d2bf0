#!/usr/bin/env python3
"""Exact prefix routing in front of genuine vLLM engines: `make test-real-vllm`.

Needs at least two running vLLM servers of one model with KV events and, for the reset step, the
development endpoints. Each is given as HTTP=EVENTS/REPLAY ports on this machine, for example
8100=5557/5657. Starts Envoy and pinpod (default ports), warms each prompt on one engine directly, so
that pinpod can know of it by KV events alone, and expects every request with that prefix that goes
through Envoy to be served with cached tokens.
"""

import argparse
import json
import pathlib
import random
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
GATEWAY = "http://127.0.0.1:8081"
WORDS = "river harbour lamp été 東京 bridge 😀 table seven cold window \n don't  naïve 12345 Straße".split(" ")
CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: token-producer
  parameters: {local: {models: [MODEL]}}
- type: precise-prefix-cache-producer
  parameters: {kvEventsConfig: {podDiscoveryConfig: {replaySocketPort: 5657}}}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: file-discovery, parameters: {path: "ENDPOINTS"}}
- type: max-score-picker
dataLayer:
  discovery: {pluginRef: file-discovery}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: prefix-cache-scorer, weight: 1}, {pluginRef: max-score-picker}]}
"""


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
        return json.loads(text) if text else None


def cached(answer):
    details = answer["usage"].get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


class Run:
    def __init__(self, engines, model, adapters, seed):
        self.engines = [f"http://127.0.0.1:{port}" for port, _, _ in engines]
        self.model, self.adapters = model, adapters
        self.rng = random.Random(seed)
        self.checks = self.failed = 0

    def text(self, words):
        return " ".join(self.rng.choice(WORDS) for _ in range(words))

    def prompt(self, number):
        """A path and a function from the end of a prompt to its body."""
        kind = self.rng.choice(["chat", "tools", "completion", "salt"] + ["adapter"] * bool(self.adapters))
        body = {"model": self.model, "max_tokens": 1}
        if kind == "adapter":
            body["model"] = self.rng.choice(self.adapters)
        if kind == "salt":
            body["cache_salt"] = f"tenant-{number}"
        if kind == "tools":
            parameters = {"type": "object", "properties": {"é": {"type": "number"}}}
            tool = {"name": f"f{number}", "description": "a <tool>", "parameters": parameters}
            body.update(tool_choice="none", tools=[{"type": "function", "function": tool}])
        head = self.text(self.rng.randrange(60, 200))
        if kind in ("completion", "salt"):
            return kind, "/v1/completions", lambda end: {**body, "prompt": head + end}
        messages = lambda end: [{"role": "system", "content": head}, {"role": "user", "content": "q" + end}]
        return kind, "/v1/chat/completions", lambda end: {**body, "messages": messages(end)}

    def expect_hits(self, what, path, make, requests):
        for number in range(requests):
            answer = call(GATEWAY + path, make(f" {self.text(3)} {number}"))
            self.checks += 1
            if cached(answer) == 0:
                self.failed += 1
                print(f"FAILED {what}: none of {answer['usage']['prompt_tokens']} tokens was cached")

    def warm(self, engine, path, make):
        call(self.engines[engine] + path, make(" zero"))
        time.sleep(0.15)

    def prompts(self, count):
        for number in range(count):
            kind, path, make = self.prompt(number)
            self.warm(self.rng.randrange(len(self.engines)), path, make)
            self.expect_hits(f"{kind} {number}", path, make, 3)

    def reset(self, count):
        """What an engine forgot must be looked for elsewhere."""
        for number in range(count):
            kind, path, make = self.prompt(1000 + number)
            home = self.rng.randrange(len(self.engines))
            other = (home + 1) % len(self.engines)
            self.warm(home, path, make)
            call(self.engines[home] + "/reset_prefix_cache", {})
            # The clear is told with the engine's next step.
            call(self.engines[home] + "/v1/completions", {"model": self.model, "prompt": "x" * 99, "max_tokens": 1})
            self.warm(other, path, make)
            self.expect_hits(f"reset {kind} {number}", path, make, 2)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--engines", required=True, help="comma-separated HTTP=EVENTS/REPLAY ports")
    arguments.add_argument("--tokenizer", required=True, help="directory of the model's tokenizer")
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--adapters", default="", help="comma-separated LoRA names")
    arguments.add_argument("--pinpod", default=ROOT / "target/release/pinpod")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    engines = []
    for text in given.engines.split(","):
        port, sockets = text.split("=")
        engines.append((port, *sockets.split("/")))
    adapters = [name for name in given.adapters.split(",") if name]
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        listed = [
            {
                "name": f"engine-{port}", "address": "127.0.0.1", "port": port,
                "labels": {"pinpod.dev/kv-events-port": events, "pinpod.dev/kv-events-replay-port": replay},
            }
            for port, events, replay in engines
        ]
        (directory / "endpoints.json").write_text(json.dumps({"endpoints": listed}))
        model = json.dumps({"name": given.model, "directory": given.tokenizer, "adapters": adapters})
        config = CONFIG.replace("MODEL", model).replace("ENDPOINTS", str(directory / "endpoints.json"))
        (directory / "config.yaml").write_text(config)
        log = open(directory / "pinpod.log", "w")
        picker = [given.pinpod, "serve", "--pool-name", "pool", "--config-file", directory / "config.yaml"]
        envoy = [ROOT / ".tools/envoy", "-c", ROOT / "deploy/envoy/original-dst.yaml", "--log-level", "error"]
        parts = [subprocess.Popen(command, stdout=log, stderr=log) for command in (picker, envoy)]
        try:
            time.sleep(4)
            run = Run(engines, given.model, adapters, given.seed)
            run.prompts(40)
            run.reset(10)
            metrics = urllib.request.urlopen("http://127.0.0.1:9090/metrics").read().decode()
            for line in metrics.splitlines():
                if line.startswith(("pinpod_precise", "pinpod_token")):
                    print(line)
            print(f"{run.checks} requests, {run.failed} without the cached prefix")
        finally:
            for part in parts:
                part.kill()
    raise SystemExit(run.failed > 0)


if __name__ == "__main__":
    main()
