#!/usr/bin/env python3
"""Prefill and decode on two genuine vLLM engines: `make test-real-pd`.

Needs two running vLLM servers of one model that hand KV blocks over by NIXL, the first as producer and
the second as consumer. Starts picker, sidecar and Envoy in front of them and shows that

- every long prompt is prefilled by the one and decoded by the other: the decode engine counts the prompt's
  tokens as external cache hits;
- greedy output equals, byte for byte, what the prefill engine says when it is asked alone, streamed and not;
- with --prefill-pid, what a client sees when the prefill engine dies after it has answered and before its
  blocks were fetched, and what the next client sees.
"""

import argparse
import http.server
import json
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
GATEWAY = "http://127.0.0.1:8081"
SIDECAR, RELAY = 8208, 8209
HITS = "vllm:external_prefix_cache_hits_total"
WORDS = "river harbour lamp été 東京 bridge 😀 table seven cold window \n don't  naïve 12345 Straße".split(" ")
CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: always-disagg-pd-decider
- type: disagg-profile-handler
  parameters: {deciders: {prefill: always-disagg-pd-decider}}
- type: prefill-filter
- type: decode-filter
- type: max-score-picker
- {type: file-discovery, parameters: {path: "ENDPOINTS"}}
dataLayer:
  discovery: {pluginRef: file-discovery}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: max-score-picker}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: max-score-picker}]}
"""


def post(url, body, timeout=120):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


def said(text, streamed):
    """The words of an answer, and its usage."""
    if not streamed:
        answers = [json.loads(text)]
    else:
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        if not lines or lines[-1] != "[DONE]":
            raise ValueError(f"the stream does not end: {text[-200:]}")
        answers = [json.loads(line) for line in lines[:-1]]
    words, usage = "", None
    for answer in answers:
        usage = answer.get("usage") or usage
        for choice in answer.get("choices", []):
            message = choice.get("message") or choice.get("delta") or choice
            words += message.get("content") or message.get("text") or ""
    return words, usage


def metric(engine, name):
    text = urllib.request.urlopen(engine + "/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


class Relay(http.server.BaseHTTPRequestHandler):
    """Stands before the prefill engine; kills it, when told to, once it has answered."""

    protocol_version = "HTTP/1.1"
    engine, kill, seen = "", None, 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        request = urllib.request.Request(self.engine + self.path, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        except OSError:
            self.close_connection = True
            return
        Relay.seen += 1
        if Relay.kill:
            os.killpg(Relay.kill, signal.SIGKILL)
            Relay.kill = None
            time.sleep(0.5)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prefill", required=True, help="HTTP port of the prefill engine")
    arguments.add_argument("--decode", required=True, help="HTTP port of the decode engine")
    arguments.add_argument("--prefill-pid", default="", help="file that begins with the prefill engine's pid")
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--prompts", type=int, default=40)
    arguments.add_argument("--pinpod", default=ROOT / "target/release/pinpod")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    prefill, decode = (f"http://127.0.0.1:{port}" for port in (given.prefill, given.decode))
    rng = random.Random(given.seed)
    Relay.engine = prefill
    relay = http.server.ThreadingHTTPServer(("127.0.0.1", RELAY), Relay)
    # The picker gives up metrics requests of its own accord.
    relay.handle_error = lambda *_: None
    threading.Thread(target=relay.serve_forever, daemon=True).start()
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        listed = [
            {"name": name, "address": "127.0.0.1", "port": str(port), "labels": {"llm-d.ai/role": name}}
            for name, port in (("prefill", RELAY), ("decode", SIDECAR))
        ]
        (directory / "endpoints.json").write_text(json.dumps({"endpoints": listed}))
        (directory / "config.yaml").write_text(CONFIG.replace("ENDPOINTS", str(directory / "endpoints.json")))
        log = open(directory / "log", "w")
        commands = [
            [given.pinpod, "serve", "--pool-name", "pool", "--config-file", directory / "config.yaml"],
            [given.pinpod, "sidecar", "--port", str(SIDECAR), "--model-server-port", given.decode,
             "--secure-proxy=false", "--allowed-targets", f"127.0.0.1:{RELAY}"],
            [ROOT / ".tools/envoy", "-c", ROOT / "deploy/envoy/original-dst.yaml", "--log-level", "error"],
        ]
        parts = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
        try:
            time.sleep(4)
            failed += handed_over(given, rng, prefill, decode)
            if given.prefill_pid:
                failed += killed(given, decode)
        finally:
            for part in parts:
                part.kill()
            if failed:
                print((directory / "log").read_text()[-3000:])
    raise SystemExit(failed > 0)


def body(given, rng, number):
    chat, streamed = number % 4 < 2, number % 2 == 1
    text = f"{number} " + " ".join(rng.choice(WORDS) for _ in range(rng.randrange(80, 900)))
    asked = {"model": given.model, "max_tokens": rng.randrange(1, 60), "temperature": 0, "stream": streamed}
    if streamed:
        asked["stream_options"] = {"include_usage": True}
    if chat:
        return "/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": text}]}, streamed
    return "/v1/completions", {**asked, "prompt": text}, streamed


def handed_over(given, rng, prefill, decode):
    failed = streams = tokens = 0
    before, seen = metric(decode, HITS), Relay.seen
    for number in range(given.prompts):
        path, asked, streamed = body(given, rng, number)
        streams += streamed
        words, usage = said(post(GATEWAY + path, asked), streamed)
        alone, usage_alone = said(post(prefill + path, asked), streamed)
        tokens += usage["prompt_tokens"]
        if words != alone or usage["completion_tokens"] != usage_alone["completion_tokens"]:
            failed += 1
            print(f"FAILED {number}: {words[:80]!r} is not {alone[:80]!r}")
    hits = metric(decode, HITS) - before
    print(f"{given.prompts} prompts ({streams} streamed), {Relay.seen - seen} prefilled apart, {failed} differ from the engine alone")
    print(f"decode engine: {hits:.0f} of {tokens} prompt tokens were external cache hits")
    # Only what is left of a block is computed where it is decoded: 16 tokens at most.
    if Relay.seen - seen != given.prompts or hits < tokens - 16 * given.prompts:
        failed += 1
        print("FAILED: not every prompt was handed over")
    return failed


def killed(given, decode):
    failed = 0
    asked = {"model": given.model, "max_tokens": 20, "temperature": 0, "prompt": "x " * 900}
    Relay.kill = int(pathlib.Path(given.prefill_pid).read_text().split()[0])
    for what in ("the prefill engine dies before its blocks are fetched", "the prefill engine is gone"):
        started = time.monotonic()
        try:
            words, usage = said(post(GATEWAY + "/v1/completions", asked), False)
            outcome = f"200, {usage['completion_tokens']} tokens"
            expected, _ = said(post(decode + "/v1/completions", asked), False)
            if words != expected:
                failed += 1
                outcome += ", WRONG"
        except urllib.error.HTTPError as error:
            outcome = f"{error.code} {error.read().decode()[:200]}"
        print(f"{what}: {outcome}, after {time.monotonic() - started:.1f} s")
    return failed


if __name__ == "__main__":
    main()
