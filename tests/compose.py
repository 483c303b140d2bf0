"""Runs the very docker-compose file and asserts that it shows what its README promises.

  python3 tests/compose.py [--no-build] [--without grafana]

Requests reach all four pods, a conversation stays on its pod, Prometheus scrapes every target, loads the
alerts, and has data for every query of the dashboard. Everything is taken down at the end.
"""

import argparse
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "deploy/compose/docker-compose.yaml"
DASHBOARD = ROOT / "deploy/monitoring/dashboard.json"
ALERTS = ROOT / "deploy/monitoring/alerts.yaml"
PATIENCE = 120


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def compose_command():
    for command in (["docker", "compose"], ["docker-compose"]):
        try:
            if subprocess.run([*command, "version"], capture_output=True).returncode == 0:
                return command
        except FileNotFoundError:
            pass
    sys.exit("neither `docker compose` nor docker-compose is here")


def get(url, body=None):
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.headers, answer.read()


def wait_for(what, condition):
    deadline = time.monotonic() + PATIENCE
    last = None
    while time.monotonic() < deadline:
        try:
            last = condition()
            if last:
                return last
        except (OSError, urllib.error.URLError) as error:
            last = error
        time.sleep(0.5)
    sys.exit(f"{what}: not within {PATIENCE} s, last {last}")


def complete(gateway, prompt):
    body = json.dumps({"model": "sim-model", "prompt": prompt, "max_tokens": 4}).encode()
    headers, answer = get(f"{gateway}/v1/completions", body)
    assert json.loads(answer)["usage"]["completion_tokens"] == 4, answer
    return headers["x-sim-name"]


def check_traffic(gateway):
    wait_for("the gateway answers", lambda: complete(gateway, "hello"))
    picks = {}
    for conversation in range(16):
        # Long enough to be worth following: some forty blocks of 16 tokens.
        history = f"conversation {conversation} " * 150
        pods = {complete(gateway, history + f"turn {turn} " * (turn + 1)) for turn in range(4)}
        assert len(pods) == 1, f"conversation {conversation} moved: {pods}"
        pod = pods.pop()
        picks[pod] = picks.get(pod, 0) + 1
    assert len(picks) == 4, picks
    print("conversations by pod:")
    for pod, count in sorted(picks.items()):
        print(f"  {pod:8} {count}")


def query(prometheus, text):
    _, answer = get(f"{prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": text}))
    return json.loads(answer)["data"]["result"]


def check_prometheus(prometheus):
    def all_up():
        result = query(prometheus, "up")
        return len(result) == 6 and all(r["value"][1] == "1" for r in result)

    wait_for("all six targets are up", all_up)
    _, answer = get(f"{prometheus}/api/v1/rules")
    rules = [r for g in json.loads(answer)["data"]["groups"] for r in g["rules"]]
    shipped = re.findall(r"^ *- alert: (\w+)$", ALERTS.read_text(), re.M)
    assert shipped and [r["name"] for r in rules] == shipped, rules
    wait_for(
        "all alerts are evaluated without error",
        lambda: all(
            r["health"] == "ok"
            for g in json.loads(get(f"{prometheus}/api/v1/rules")[1])["data"]["groups"]
            for r in g["rules"]
        ),
    )
    firing = query(prometheus, 'ALERTS{alertstate="firing"}')
    assert not firing, firing


def check_dashboard(prometheus):
    print("dashboard:")
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "1m")

            def has_data(text=text):
                values = [r["value"][1] for r in query(prometheus, text)]
                return [v for v in values if v != "NaN"]

            values = wait_for(f"{panel['title']}: {text}", has_data)
            print(f"  {panel['title']:24} {target['legendFormat']:34} {' '.join(values)[:60]}")


def check_load(prometheus):
    rate = "sum(rate(llm_d_epp_request_total[30s])) > 2"
    wait_for("the load generator keeps three requests a second going", lambda: query(prometheus, rate))


def check_grafana(grafana):
    found = wait_for("the dashboard is there", lambda: get(f"{grafana}/api/dashboards/uid/pinpod")[1])
    assert json.loads(found)["dashboard"]["title"] == "pinpod"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-build", action="store_true", help="use the image pinpod:latest as it is")
    parser.add_argument("--without", action="append", default=[], help="a service not to start")
    arguments = parser.parse_args()
    names = ["GATEWAY_PORT", "METRICS_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"]
    ports = dict(zip(names, map(str, free_ports(4))))
    command = [*compose_command(), "--project-name", "pinpod-test", "--file", str(FILE)]

    def compose(*rest, **options):
        return subprocess.run([*command, *rest], env={**os.environ, **ports}, **options)

    listed = compose("config", "--services", check=True, capture_output=True, text=True).stdout.split()
    services = [s for s in listed if s not in arguments.without]
    try:
        compose("up", "--detach", "--no-build" if arguments.no_build else "--build", *services, check=True)
        address = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        check_traffic(address["GATEWAY_PORT"])
        check_prometheus(address["PROMETHEUS_PORT"])
        check_dashboard(address["PROMETHEUS_PORT"])
        check_load(address["PROMETHEUS_PORT"])
        if "grafana" in services:
            check_grafana(address["GRAFANA_PORT"])
        _, metrics = get(f"{address['METRICS_PORT']}/metrics")
        assert re.search(r"^llm_d_epp_ready_endpoints\{.*\} 4$", metrics.decode(), re.M)
        print("passed")
    except BaseException:
        compose("logs", "--tail", "30")
        raise
    finally:
        compose("down", "--volumes", "--timeout", "1")


main()
