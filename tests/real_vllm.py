#!/usr/bin/env python3
"""Exact prefix routing in front of genuine vLLM engines: `make test-real-vllm`.

Needs at least two running vLLM servers of one model with KV events, `--enable-scale-out` (for
`/render`), `--enable-prompt-tokens-details` and, for the reset steps, the development endpoints. Each is
given as HTTP=EVENTS/REPLAY ports on this machine, for example 8100=5557/5657. A small cache (some
hundred blocks) makes evictions; the longest bodies need a context of 32k tokens, else they are skipped.

agree  the engine's `/render` and `/tokenize` and `pinpod tokenize` give the same ids
hits   each prompt is warmed on one engine directly, so that pinpod can know of it by KV events alone;
       every request with that prefix that goes through Envoy must be served with cached tokens
match  the blocks that pinpod credits the picked engine with are those the engine says it reused, over
       shared prefixes, evictions, a reset of the cache and, with --restart, a restart of an engine
"""

import argparse
import json
import pathlib
import random
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from real_vllm_bodies import Bodies

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


# What `/tokenize` takes of a body; the rest of a chat it cannot be asked about.
TOKENIZE_FIELDS = {
    "messages": ["model", "messages", "tools", "add_generation_prompt", "continue_final_message",
                 "chat_template_kwargs", "add_special_tokens"],
    "prompt": ["model", "prompt", "add_special_tokens"],
}


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
        return json.loads(text) if text else None


def by_tokenize(engine, path, body):
    """Ids by `/tokenize`, or nothing when it cannot be asked."""
    if not path.endswith("completions"):
        return None
    known = next((fields for kind, fields in TOKENIZE_FIELDS.items() if kind in body), [])
    if {"documents", "reasoning_effort"} & body.keys() or not known:
        return None
    if "prompt" in body and not isinstance(body["prompt"], str):
        return None
    asked = {name: body[name] for name in known if name in body}
    return [call(engine + "/tokenize", asked)["tokens"]]


def agree(given, engine, bodies, what):
    """The engine's ids of all `bodies` and those of this process's tokenizer."""
    command = [given.pinpod, "tokenize", "--model-dir", given.tokenizer]
    if given.chat_template:
        command += ["--chat-template", given.chat_template]
    lines = "".join(json.dumps({"path": path, "body": body}) + "\n" for path, body in bodies)
    answers = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
    rendered = tokenized = tokens = longest = skipped = failed = 0
    for (path, body), answer in zip(bodies, answers, strict=True):
        own = json.loads(answer).get("prompts")
        try:
            whole = call(engine + path + "/render", body)
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            if "maximum context length" in text:
                skipped += 1
            else:
                failed += 1
                print(f"FAILED agree {what}: the engine refuses its body: {text[:300]}")
            continue
        ids = [one["token_ids"] for one in (whole if isinstance(whole, list) else [whole])]
        again = by_tokenize(engine, path, body)
        rendered += 1
        tokenized += again is not None
        tokens += sum(map(len, ids))
        longest = max(longest, *map(len, ids))
        if own != ids or again not in (None, ids):
            failed += 1
            print(f"FAILED agree {what}: {answer[:200]} is not {str(ids)[:200]}: {json.dumps(body)[:600]}")
    print(
        f"agree {what}: {rendered} bodies, {tokens} tokens (longest {longest}) by /render, {tokenized} of them also"
        f" by /tokenize: {failed} differ" + (f"; {skipped} above the engine's context skipped" if skipped else "")
    )
    return failed


def cached(answer):
    details = answer["usage"].get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


class Run:
    def __init__(self, engines, model, adapters, seed):
        self.engines = [f"http://127.0.0.1:{port}" for port, _, _ in engines]
        self.model, self.adapters = model, adapters
        self.rng = random.Random(seed)
        self.checks = self.failed = self.picks = 0

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
            self.picks += 1
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

    def credited(self, log, number):
        """What pinpod said of pick `number` in its log: blocks matched and their size. Envoy gives requests
        ids of its own, but they come one by one."""
        for _ in range(40):
            said = [line for line in log.read_text().splitlines() if '"exact prefix"' in line]
            if len(said) > number:
                return json.loads(said[number])
            time.sleep(0.05)
        raise SystemExit(f"pinpod's log has no pick {number}")

    def match(self, log, count, restart):
        """Blocks credited against blocks reused."""
        heads = [self.prompt(2000 + number) for number in range(8)]
        fills = resets = restarts = reused = 0
        tails = [[] for _ in heads]
        for number in range(count):
            which = self.rng.randrange(len(heads))
            _, path, make = heads[which]
            if number % 12 == 11:
                # Others' prompts push blocks out.
                for engine in self.engines:
                    call(engine + "/v1/completions", {"model": self.model, "prompt": self.text(600), "max_tokens": 1})
                    fills += 1
            if number == count // 3 or number == 2 * count // 3:
                engine = self.rng.choice(self.engines)
                call(engine + "/reset_prefix_cache", {})
                call(engine + "/v1/completions", {"model": self.model, "prompt": "x" * 99, "max_tokens": 1})
                resets += 1
            if restart and number == count // 2:
                port = self.engines[0].rsplit(":", 1)[1]
                subprocess.run(restart.replace("PORT", port), shell=True, check=True, stdout=subprocess.DEVNULL)
                restarts += 1
                time.sleep(8)
            # Some go on where an earlier one ended, some repeat it, some part early.
            earlier = self.rng.choice(tails[which]) if tails[which] and self.rng.random() < 0.7 else ""
            tail = earlier + self.rng.choice(["", " " + self.text(self.rng.randrange(5, 120))])
            tails[which].append(tail)
            if self.rng.random() < 0.3:
                call(self.rng.choice(self.engines) + path, make(tail))
            time.sleep(0.2)
            answer = call(GATEWAY + path, make(tail))
            said = self.credited(log, self.picks + number)
            size, tokens = said["block_size_tokens"], answer["usage"]["prompt_tokens"]
            # The last token is always computed, and blocks are reused whole.
            usable = min(said["matched_blocks"], (tokens - 1) // size) * size
            self.checks += 1
            reused += usable > 0
            if usable != cached(answer):
                self.failed += 1
                print(f"FAILED match {number}: credited {said}, of {tokens} tokens {cached(answer)} were cached")
        print(
            f"match: {count} requests, {reused} of them with reused blocks, through {fills} foreign prompts,"
            f" {resets} resets and {restarts} restarts: {self.failed} differ"
        )


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--engines", required=True, help="comma-separated HTTP=EVENTS/REPLAY ports")
    arguments.add_argument("--tokenizer", required=True, help="directory of the model's tokenizer")
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--adapters", default="", help="comma-separated LoRA names")
    arguments.add_argument("--chat-template", default="", help="the engines' --chat-template")
    arguments.add_argument("--restart", default="", help="command that restarts the engine at port PORT and waits for it")
    arguments.add_argument("--steps", default="agree,hits,match")
    arguments.add_argument("--pinpod", default=ROOT / "target/release/pinpod")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    engines = []
    for text in given.engines.split(","):
        port, sockets = text.split("=")
        engines.append((port, *sockets.split("/")))
    adapters = [name for name in given.adapters.split(",") if name]
    steps, failed = given.steps.split(","), 0
    if "agree" in steps:
        bodies = Bodies(random.Random(given.seed), given.model)
        engine = f"http://127.0.0.1:{engines[0][0]}"
        failed += agree(given, engine, bodies.draw(200), "chats and completions")
        failed += agree(given, engine, [bodies.anthropic() for _ in range(60)], "messages")
        failed += agree(given, engine, [bodies.response() for _ in range(60)], "responses")
    if not {"hits", "match"} & set(steps):
        raise SystemExit(failed > 0)
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
        model = {"name": given.model, "directory": given.tokenizer, "adapters": adapters}
        if given.chat_template:
            model["chatTemplate"] = str(pathlib.Path(given.chat_template).resolve())
        model = json.dumps(model)
        config = CONFIG.replace("MODEL", model).replace("ENDPOINTS", str(directory / "endpoints.json"))
        (directory / "config.yaml").write_text(config)
        log = open(directory / "pinpod.log", "w")
        picker = [given.pinpod, "serve", "--pool-name", "pool", "--config-file", directory / "config.yaml"]
        picker += ["--zap-encoder", "json", "--zap-log-level", "debug"]
        envoy = [ROOT / ".tools/envoy", "-c", ROOT / "deploy/envoy/original-dst.yaml", "--log-level", "error"]
        parts = [subprocess.Popen(command, stdout=log, stderr=log) for command in (picker, envoy)]
        try:
            time.sleep(4)
            run = Run(engines, given.model, adapters, given.seed)
            if "hits" in steps:
                run.prompts(40)
                run.reset(10)
                print(f"hits: {run.checks} requests, {run.failed} without the cached prefix")
                failed, run.failed = failed + run.failed, 0
            if "match" in steps:
                run.match(directory / "pinpod.log", 100, given.restart)
            metrics = urllib.request.urlopen("http://127.0.0.1:9090/metrics").read().decode()
            for line in metrics.splitlines():
                if line.startswith(("pinpod_precise", "pinpod_token")):
                    print(line)
            failed += run.failed
        finally:
            for part in parts:
                part.kill()
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
