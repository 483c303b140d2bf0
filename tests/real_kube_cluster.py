"""A genuine kube-apiserver with etcd and without nodes, pods that answer, pickers and a proxy: what
`real_kube.py` talks to."""

import http.server
import json
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMESPACE = "llm"
ADMIN = "admin-token"
# What an idle vLLM says of its load; without it a pod counts as saturated and low priorities are refused.
IDLE = "".join(f"# TYPE vllm:{name} gauge\nvllm:{name}{{model_name=\"m\"}} 0\n" for name in (
    "num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"))
# Where each kind lives: its plural, and whether in a namespace.
KINDS = {
    "Namespace": ("namespaces", False),
    "Pod": ("pods", True),
    "Service": ("services", True),
    "ServiceAccount": ("serviceaccounts", True),
    "ConfigMap": ("configmaps", True),
    "Secret": ("secrets", True),
    "Deployment": ("deployments", True),
    "PodDisruptionBudget": ("poddisruptionbudgets", True),
    "HorizontalPodAutoscaler": ("horizontalpodautoscalers", True),
    "NetworkPolicy": ("networkpolicies", True),
    "Role": ("roles", True),
    "RoleBinding": ("rolebindings", True),
    "ClusterRole": ("clusterroles", False),
    "ClusterRoleBinding": ("clusterrolebindings", False),
    "Lease": ("leases", True),
    "CustomResourceDefinition": ("customresourcedefinitions", False),
    "InferencePool": ("inferencepools", True),
    "InferenceObjective": ("inferenceobjectives", True),
    "InferenceModelRewrite": ("inferencemodelrewrites", True),
}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def wait_for(what, condition, patience=30.0):
    """The first true value of `condition`, and the seconds until it came."""
    begun = time.monotonic()
    last = None
    while time.monotonic() - begun < patience:
        try:
            last = condition()
            if last:
                return last, time.monotonic() - begun
        except (OSError, urllib.error.URLError, Refused) as error:
            last = error
        time.sleep(0.01)
    raise SystemExit(f"{what}: not within {patience} s; last {last}")


class Refused(Exception):
    def __init__(self, status, text):
        super().__init__(f"{status} {text}")
        self.status = status


class Process:
    """A child with its log."""

    def __init__(self, directory, name, command, **environment):
        self.name, self.log, self.environment = name, directory / f"{name}.log", environment
        self.command, self.child = [str(word) for word in command], None

    def start(self):
        with open(self.log, "a") as log:
            environment = {**os.environ, **self.environment}
            self.child = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def stop(self, how=signal.SIGKILL, patience=30):
        self.child.send_signal(how)
        return self.child.wait(patience)

    def tail(self, lines=15):
        return "\n".join(self.log.read_text().splitlines()[-lines:])


class Cluster:
    """etcd and kube-apiserver; RBAC decides, tokens authenticate."""

    def __init__(self, directory, apiserver, etcd):
        self.directory, self.port, self.etcd_port = directory, free_port(), free_port()
        peers = free_port()
        self.keys()
        self.etcd = Process(directory, "etcd", [
            etcd, "--data-dir", directory / "etcd", "--name", "one",
            "--listen-client-urls", f"http://127.0.0.1:{self.etcd_port}",
            "--advertise-client-urls", f"http://127.0.0.1:{self.etcd_port}",
            "--listen-peer-urls", f"http://127.0.0.1:{peers}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peers}",
            "--initial-cluster", f"one=http://127.0.0.1:{peers}",
        ])
        self.server = Process(directory, "kube-apiserver", [
            apiserver, f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            "--bind-address=127.0.0.1", f"--secure-port={self.port}", "--advertise-address=192.0.2.1",
            f"--tls-cert-file={directory / 'server.crt'}", f"--tls-private-key-file={directory / 'server.key'}",
            f"--cert-dir={directory / 'certificates'}",
            f"--service-account-key-file={directory / 'accounts.key'}",
            f"--service-account-signing-key-file={directory / 'accounts.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={directory / 'tokens.csv'}", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16", "--endpoint-reconciler-type=none",
        ])
        self.trust = ssl.create_default_context(cafile=str(directory / "ca.crt"))

    def keys(self):
        d = self.directory
        (d / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        (d / "san.cnf").write_text("subjectAltName=IP:127.0.0.1,DNS:kubernetes.default.svc\n")
        new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj"]
        for command in (
            [*new, "/CN=test-ca", "-x509", "-days", "2", "-keyout", d / "ca.key", "-out", d / "ca.crt"],
            [*new, "/CN=kube-apiserver", "-keyout", d / "server.key", "-out", d / "server.csr"],
            ["openssl", "x509", "-req", "-days", "2", "-in", d / "server.csr", "-CA", d / "ca.crt", "-CAkey",
             d / "ca.key", "-CAcreateserial", "-extfile", d / "san.cnf", "-out", d / "server.crt"],
            ["openssl", "genrsa", "-out", d / "accounts.key", "2048"],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def start(self):
        self.etcd.start()
        self.server.start()
        self.wait()

    def wait(self):
        wait_for("kube-apiserver is ready", lambda: self.call("GET", "/readyz", raw=True) == "ok", 180)

    def restart(self):
        self.server.stop()
        self.server.start()
        self.wait()

    def stop(self):
        for part in (self.server, self.etcd):
            if part.child and part.child.poll() is None:
                part.stop()

    def call(self, method, path, body=None, token=ADMIN, kind="application/json", raw=False):
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {token}", "content-type": kind}
        url = f"https://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30, context=self.trust) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode()) from None
        return text if raw else json.loads(text)

    def path(self, manifest, name=True):
        plural, is_in_namespace = KINDS[manifest["kind"]]
        version = manifest["apiVersion"]
        path = f"/api/{version}" if version == "v1" else f"/apis/{version}"
        if is_in_namespace:
            path += f"/namespaces/{manifest['metadata'].get('namespace', NAMESPACE)}"
        return f"{path}/{plural}" + (f"/{manifest['metadata']['name']}" if name else "")

    def create(self, manifest, query=""):
        return self.call("POST", f"{self.path(manifest, name=False)}?fieldValidation=Strict{query}", manifest)

    def change(self, manifest, patch, part=""):
        return self.call("PATCH", self.path(manifest) + part, patch, kind="application/merge-patch+json")

    def delete(self, manifest, seconds=0):
        return self.call("DELETE", f"{self.path(manifest)}?gracePeriodSeconds={seconds}")

    def token(self, account):
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
        return self.call("POST", path, request)["status"]["token"]

    def kubeconfig(self, name, token):
        """A kubeconfig whose token is in a file, as a pod's is."""
        (self.directory / f"{name}.token").write_text(token)
        document = {
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": NAMESPACE}}],
            "clusters": [{"name": "it", "cluster": {
                "server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.directory / "ca.crt")}}],
            "users": [{"name": "it", "user": {"tokenFile": str(self.directory / f"{name}.token")}}],
        }
        path = self.directory / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path

    def compact(self):
        """Makes etcd forget everything before now."""
        def etcd(path, body):
            request = urllib.request.Request(f"http://127.0.0.1:{self.etcd_port}/v3/kv/{path}", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read())
        revision = etcd("range", {"key": "AA=="})["header"]["revision"]
        etcd("compaction", {"revision": revision, "physical": True})
        return int(revision)


class ModelServer:
    """What a pod's address answers: who it is and which model it was asked for."""

    def __init__(self, ip, port):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body):
                text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(200)
                self.send_header("content-type", "text/plain" if isinstance(body, str) else "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self):
                self.answer(IDLE if self.path == "/metrics" else {"data": [{"id": "m"}]})

            def do_POST(self):
                chunks = []
                if self.headers.get("transfer-encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        chunks.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    chunks.append(self.rfile.read(int(self.headers["content-length"])))
                body = json.loads(b"".join(chunks))
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                self.answer({"served_by": f"{ip}:{port}", "asked_for": body["model"], "model": body["model"],
                             "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": usage})

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, allow_reuse_address = True, True

            def handle_error(self, *_):
                """Pickers and proxies are killed here, in the middle of a request too."""

        threading.Thread(target=Server((ip, port), Handler).serve_forever, daemon=True).start()


class Picker:
    """`pinpod serve` with the picker's account."""

    def __init__(self, cluster, pinpod, name, kubeconfig, flags=(), target=("--pool-name", "qwen")):
        self.cluster, self.name = cluster, name
        self.grpc, self.health, self.metrics = free_port(), free_port(), free_port()
        config = cluster.directory / "config.yaml"
        self.process = Process(cluster.directory, name, [
            pinpod, "serve", "--kubeconfig", kubeconfig, *target, "--pool-namespace", NAMESPACE,
            f"--grpc-port={self.grpc}", f"--grpc-health-port={self.health}", f"--metrics-port={self.metrics}",
            "--config-file", config, "--zap-encoder=json", "--drain-timeout=3s", "--workers=1", *flags,
        ], NAMESPACE=NAMESPACE, POD_NAME=name)

    def get(self, path, token):
        headers = {"authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def endpoints(self, token):
        status, text = self.get("/debug/plugins/state", token)
        if status != 200:
            raise Refused(status, text)
        return sorted(json.loads(text)["plugins"]["inflight-load-producer"]["state"])

    def metric(self, token, name, **labels):
        """Sum of the samples of a series that have these labels."""
        status, text = self.get("/metrics", token)
        if status != 200:
            raise Refused(status, text)
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        total = 0.0
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(label in head for label in wanted):
                total += float(value)
        return total

    def serving(self, service="readiness"):
        """gRPC health; nothing when nobody answers."""
        message = bytes([0x0A, len(service)]) + service.encode()
        frame = b"\0" + len(message).to_bytes(4, "big") + message
        command = ["curl", "--silent", "--max-time", "5", "--http2-prior-knowledge", "--data-binary", "@-",
                   "-H", "content-type: application/grpc", "-H", "te: trailers",
                   f"http://127.0.0.1:{self.health}/grpc.health.v1.Health/Check"]
        answer = subprocess.run(command, input=frame, capture_output=True).stdout
        return None if not answer else answer[5:] == b"\x08\x01"


class Proxy:
    """The shipped Envoy configuration in front of some pickers; it asks the one that is healthy."""

    def __init__(self, directory, envoy, pickers):
        self.port, self.admin = free_port(), free_port()
        document = yaml.safe_load((ROOT / "deploy/envoy/original-dst.yaml").read_text())
        resources = document["static_resources"]
        local = lambda port: {"socket_address": {"address": "127.0.0.1", "port_value": port}}
        document["admin"]["address"] = local(self.admin)
        for listener in resources["listeners"]:
            listener["address"] = local(self.port if listener["name"] == "inference" else free_port())
        for cluster in resources["clusters"]:
            if cluster["name"] == "epp":
                hosts = [{"endpoint": {"address": local(picker.grpc)}} for picker in pickers]
                cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": hosts}]
        path = directory / f"envoy-{self.port}.json"
        path.write_text(json.dumps(document))
        self.process = Process(directory, f"envoy-{self.port}", [
            envoy, "-c", path, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"])

    def ask(self, model="m", headers=None):
        """The answer of a pod, or the status of a refusal."""
        body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 1}).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code
