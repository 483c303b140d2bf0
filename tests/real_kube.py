#!/usr/bin/env python3
"""pinpod against a genuine kube-apiserver with etcd: `make test-real-kube`.

Starts both binaries and applies what deploy/ ships: the CRDs, the account and its rights. Pickers run with
that account's token and no other right. There are no nodes: pods are objects whose status is patched, and
their addresses (127.0.0.2 and on) are answered by this script. Nothing outside this machine is talked to.

manifests  every manifest that this server knows the kind of is accepted, unknown fields refused
discovery  readiness, labels, deletion, another pod of the same name, target ports, the pool itself
others     a selector instead of a pool, a pool of the older group
rules      objectives and model rewrites, seen by requests through Envoy
metrics    who may read the metrics port
outage     kube-apiserver is killed and comes back; etcd forgets the versions that watches know
election   two replicas, one leads; it ends by SIGTERM and by SIGKILL
doctor     what `pinpod doctor` says of it
"""

import argparse
import json
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

import yaml

from real_kube_cluster import (KINDS, NAMESPACE, ROOT, Cluster, ModelServer, Picker, Process, Proxy, Refused, free_port,
                               wait_for)

DEPLOY = ROOT / "deploy/kubernetes"
# Addresses of this machine, one for each pod.
PODS = {"a": "127.0.0.2", "b": "127.0.0.3", "c": "127.0.0.4"}
# How soon the picker must know what the API server knows.
SOON = 1.0


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pod(name, ip, labels=None, account="default", arguments=()):
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels or {"app": "qwen"}},
        "spec": {"serviceAccountName": account, "nodeName": "nowhere",
                 "containers": [{"name": "main", "image": "none", "args": list(arguments)}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                   "conditions": [{"type": "Ready", "status": "True"}]},
    }


def ready(is_ready):
    return {"status": {"conditions": [{"type": "Ready", "status": str(is_ready)}]}}


class Run:
    def __init__(self, given, directory):
        self.given, self.directory = given, directory
        self.cluster = Cluster(directory, given.apiserver, given.etcd)
        self.parts, self.failed = [], 0
        self.port = free_port()
        for ip in PODS.values():
            ModelServer(ip, self.port)

    # -- reporting --

    def check(self, what, good, seen=""):
        self.failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {what}" + (f": {seen}" if seen != "" else ""), flush=True)

    def soon(self, what, condition, limit=SOON, patience=30):
        """`condition` must come true within `limit` seconds."""
        _, seconds = wait_for(what, condition, patience)
        self.check(what, seconds <= limit, f"{seconds * 1000:.0f} ms")

    # -- parts --

    def start(self, part):
        self.parts.append(part if isinstance(part, Process) else part.process)
        self.parts[-1].start()
        return part

    def picker(self, name, *flags, **target):
        return self.start(Picker(self.cluster, self.given.pinpod, name, self.account, flags, **target))

    def apply(self, manifest):
        """Creates an object; the status of a pod is a request of its own."""
        made = self.cluster.create(manifest)
        if "status" in manifest:
            self.cluster.change(manifest, {"status": manifest["status"]}, "/status")
        return made

    def at(self, *names, port=None):
        return sorted(f"{PODS[name]}:{port or self.port}" for name in names)

    def has(self, picker, *names, port=None):
        return lambda: picker.endpoints(self.scraper) == self.at(*names, port=port)

    # -- steps --

    def manifests(self):
        cluster = self.cluster
        for path in sorted((DEPLOY / "crds").glob("*.yaml")):
            for document in documents(path):
                cluster.create(document)
        for path in sorted((DEPLOY / "crds").glob("*.yaml")):
            spec = documents(path)[0]["spec"]
            for version in spec["versions"]:
                served = f"/apis/{spec['group']}/{version['name']}/{spec['names']['plural']}"
                wait_for(f"{served} is served", lambda: cluster.call("GET", served))
        applied = 0
        for document in documents(DEPLOY / "picker.yaml"):
            if document["kind"] == "InferencePool":
                # The pods of this test listen where there is room.
                document["spec"]["targetPorts"] = [{"number": self.port}]
                self.pool = document
            cluster.create(document)
            applied += 1
        self.check("picker.yaml is accepted", True, f"{applied} objects")
        for name in ("default", "scraper", "visitor"):
            cluster.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NAMESPACE}})
        cluster.create({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "scraper"},
            "rules": [{"nonResourceURLs": ["/metrics", "/debug/*"], "verbs": ["get"]}]})
        cluster.create({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "scraper"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "scraper"},
            "subjects": [{"kind": "ServiceAccount", "name": "scraper", "namespace": NAMESPACE}]})
        self.scraper, self.visitor = cluster.token("scraper"), cluster.token("visitor")
        self.account = cluster.kubeconfig("picker", cluster.token("qwen-epp"))
        [text] = [d["data"]["config.yaml"] for d in documents(DEPLOY / "picker.yaml") if d["kind"] == "ConfigMap"]
        (self.directory / "config.yaml").write_text(text)
        self.dry_run()

    def dry_run(self):
        """The other manifests, without effect; kinds of other projects are not known here."""
        tried, unknown, wrong = 0, set(), []
        files = sorted(DEPLOY.glob("*.yaml")) + sorted((ROOT / "tests/data/chart").glob("*.yaml"))
        for path in files:
            for document in documents(path):
                if document["kind"] not in KINDS or document["kind"] == "Namespace":
                    unknown.add(document["kind"])
                    continue
                if path.name != "picker.yaml":
                    # One of that name may be there already.
                    document["metadata"]["name"] += "-dry"
                    try:
                        self.cluster.create(document, "&dryRun=All")
                        tried += 1
                    except Refused as error:
                        wrong.append(f"{path.name} {document['kind']}: {error}")
        self.check("other manifests and the rendered chart are accepted", not wrong, f"{tried} objects")
        print(f"       kinds this server does not know: {sorted(unknown)}", *wrong, sep="\n       ")

    def discovery(self):
        cluster, picker = self.cluster, self.picker("alone")
        # Reading the state needs the metrics port's own reviews, with the picker's account.
        wait_for("the picker answers", lambda: picker.endpoints(self.scraper) == [])
        wait_for("ready with an empty pool", picker.serving)
        pods = {name: pod(name, ip) for name, ip in PODS.items()}
        self.apply(pods["a"])
        self.soon("a pod that becomes ready joins", self.has(picker, "a"))
        self.apply(pods["b"])
        self.soon("another joins", self.has(picker, "a", "b"))
        cluster.change(pods["a"], ready(False), "/status")
        self.soon("one that is not ready leaves", self.has(picker, "b"))
        cluster.change(pods["a"], ready(True), "/status")
        self.soon("and comes back", self.has(picker, "a", "b"))
        cluster.change(pods["a"], {"metadata": {"labels": {"app": "other"}}})
        self.soon("other labels put it out", self.has(picker, "b"))
        cluster.change(pods["a"], {"metadata": {"labels": {"app": "qwen"}}})
        self.soon("and in again", self.has(picker, "a", "b"))
        cluster.delete(pods["a"], seconds=30)
        self.soon("a pod asked to end leaves while it still runs", self.has(picker, "b"))
        cluster.delete(pods["a"])
        cluster.create(pods["a"])
        cluster.change(pods["a"], {"status": pods["a"]["status"]}, "/status")
        self.soon("another of the same name joins", self.has(picker, "a", "b"))
        cluster.delete(pods["b"])
        self.soon("a deleted one leaves", self.has(picker, "a"))
        self.apply(pods["b"])
        self.soon("the pool is whole", self.has(picker, "a", "b"))
        cluster.change(pods["b"], {"metadata": {"annotations": {"llm-d.ai/active-ports": "1"}}})
        self.soon("an annotation closes its port", self.has(picker, "a"))
        cluster.change(pods["b"], {"metadata": {"annotations": {"llm-d.ai/active-ports": None}}})
        other = free_port()
        cluster.change(self.pool, {"spec": {"targetPorts": [{"number": other}]}})
        self.soon("another target port", self.has(picker, "a", "b", port=other))
        cluster.change(self.pool, {"spec": {"targetPorts": [{"number": self.port}, {"number": other}]}})
        both = sorted(self.at("a", "b") + self.at("a", "b", port=other))
        self.soon("two target ports are two endpoints a pod", lambda: picker.endpoints(self.scraper) == both)
        cluster.change(self.pool, {"spec": {"targetPorts": [{"number": self.port}]}})
        self.soon("one again", self.has(picker, "a", "b"))
        cluster.delete(self.pool)
        self.soon("without a pool there is nothing", lambda: picker.endpoints(self.scraper) == [] and not picker.serving())
        cluster.create(self.pool)
        self.soon("a new pool of that name", lambda: self.has(picker, "a", "b")() and picker.serving())
        self.burst(picker)
        failures = picker.metric(self.scraper, "pinpod_kubernetes_failures_total")
        self.check("no request of a watch failed", failures == 0, int(failures))
        self.alone = picker

    def burst(self, picker):
        """Many pods at once, as fast as the server takes them."""
        many = [pod(f"many-{n:03}", f"127.1.{n // 200}.{n % 200 + 1}") for n in range(300)]
        begun = time.monotonic()
        for each in many:
            self.apply(each)
        took = time.monotonic() - begun
        self.soon(f"{len(many)} pods more, made in {took:.1f} s", lambda: len(picker.endpoints(self.scraper)) == len(many) + 2)
        path = f"/api/v1/namespaces/{NAMESPACE}/pods?gracePeriodSeconds=0&fieldSelector=status.podIP!={PODS['a']},status.podIP!={PODS['b']}"
        self.cluster.call("DELETE", path)
        self.soon("and deleted together", self.has(picker, "a", "b"))

    def others(self):
        """A selector instead of a pool, and a pool of the group before v1."""
        target = ["--endpoint-selector", "app in (qwen, other),!retired", "--endpoint-target-ports", self.port]
        picker = self.picker("sel-7d9f8c6b5-x2x9z", target=target)
        wait_for("a selector finds the pods", self.has(picker, "a", "b"))
        first = pod("a", PODS["a"])
        self.cluster.change(first, {"metadata": {"labels": {"retired": "yes"}}})
        self.soon("a selector of sets and absence", self.has(picker, "b"))
        self.cluster.change(first, {"metadata": {"labels": {"retired": None}}})
        self.soon("and back", self.has(picker, "a", "b"))
        picker.process.stop(signal.SIGTERM)
        [old] = documents(DEPLOY / "pool-v1alpha2.yaml")
        old["metadata"]["name"], old["spec"]["targetPortNumber"] = "old", self.port
        picker = self.picker("old", target=["--pool-name", "old"])
        wait_for("it lives without a pool", lambda: picker.endpoints(self.scraper) == [])
        self.cluster.create(old)
        self.soon("a pool of the older group", self.has(picker, "a", "b"))
        picker.process.stop(signal.SIGTERM)

    def rules(self):
        cluster, picker = self.cluster, self.alone
        proxy = self.start(Proxy(self.directory, self.given.envoy, [picker]))
        wait_for("Envoy finds the picker", lambda: isinstance(proxy.ask(), dict))
        served = {proxy.ask()["served_by"] for _ in range(12)}
        self.check("requests reach pods of the pool", served <= set(self.at("a", "b")), sorted(served))

        def priority(objective):
            headers = {"x-llm-d-inference-objective": objective}
            before = picker.metric(self.scraper, "llm_d_epp_request_total", priority=str(objective_priority[objective]))
            proxy.ask(headers=headers)
            after = picker.metric(self.scraper, "llm_d_epp_request_total", priority=str(objective_priority[objective]))
            return after == before + 1

        objective_priority = {"interactive": 10}
        self.check("an objective of picker.yaml gives its priority", priority("interactive"))
        batch = {"apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceObjective",
                 "metadata": {"name": "batch", "namespace": NAMESPACE},
                 "spec": {"priority": -5, "poolRef": {"name": "qwen"}}}
        cluster.create(batch)
        objective_priority["batch"] = -5
        self.soon("a new objective counts", lambda: priority("batch"))
        cluster.change(batch, {"spec": {"priority": -7}})
        objective_priority["batch"] = -7
        self.soon("a changed one too", lambda: priority("batch"))

        def rewrite(name, model, target):
            return {"apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceModelRewrite",
                    "metadata": {"name": name, "namespace": NAMESPACE},
                    "spec": {"poolRef": {"name": "qwen"},
                             "rules": [{"matches": [{"model": {"value": model}}], "targets": [{"modelRewrite": target}]}]}}

        first = rewrite("first", "chat", "qwen-7b")
        cluster.create(first)
        self.soon("a rewrite changes the model", lambda: proxy.ask("chat")["asked_for"] == "qwen-7b")
        self.check("and no other model", proxy.ask("m")["asked_for"] == "m")
        cluster.change(first, {"spec": rewrite("first", "chat", "qwen-72b")["spec"]})
        self.soon("a changed one too", lambda: proxy.ask("chat")["asked_for"] == "qwen-72b")
        cluster.delete(first)
        self.soon("deleted, it does not", lambda: proxy.ask("chat")["asked_for"] == "chat")
        self.proxy = proxy

    def metrics(self):
        picker = self.alone
        for what, token, status in (
            ("an account with the right reads metrics", self.scraper, 200),
            ("one without it does not", self.visitor, 403),
            ("nor somebody without a token", None, 401),
            ("nor one with a forged token", self.visitor[:-4] + "AAAA", 401),
        ):
            seen = picker.get("/metrics", token)
            self.check(what, seen[0] == status, f"{seen[0]} {seen[1][:60].strip() if seen[0] != 200 else ''}")

    def outage(self):
        cluster, picker, metric = self.cluster, self.alone, self.alone.metric
        contact = lambda: metric(self.scraper, "pinpod_kubernetes_watch_connected", resource="pods")
        self.check("the watch of pods is connected", contact() == 1)
        cluster.server.stop()
        answered, refused, over = 0, [], threading.Event()

        def load():
            nonlocal answered
            while not over.is_set():
                answer = self.proxy.ask()
                if isinstance(answer, dict):
                    answered += 1
                else:
                    refused.append(answer)
                time.sleep(0.05)

        thread = threading.Thread(target=load)
        thread.start()
        self.soon("health tells that the API server is gone", lambda: picker.serving("kubernetes") is False, limit=5)
        self.check("so do metrics", contact() == 0)
        time.sleep(self.given.outage)
        self.check("the last state stands", picker.endpoints(self.scraper) == self.at("a", "b") and picker.serving())
        cluster.server.start()
        cluster.wait()
        self.soon("the picker is back in touch", lambda: picker.serving("kubernetes"), limit=20, patience=60)
        over.set()
        thread.join()
        self.check("requests went on all the while", answered > 0 and not refused, f"{answered} answered, {len(refused)} refused")
        third = pod("c", PODS["c"])
        self.apply(third)
        # Reading the state needs reviews again, which a server that starts refuses for some seconds more.
        wait_for("reviews are answered", lambda: picker.get("/metrics", self.scraper)[0] == 200)
        self.soon("changes are heard again", self.has(picker, "a", "b", "c"))

        gone = lambda: metric(self.scraper, "pinpod_kubernetes_failures_total", reason="gone")
        lists = lambda: metric(self.scraper, "pinpod_kubernetes_lists_total", resource="pods")
        before, listed = gone(), lists()
        # The picker sleeps from before what changes until after etcd forgot it, over two restarts: no
        # event can wait for it in a connection.
        picker.process.child.send_signal(signal.SIGSTOP)
        cluster.restart()
        cluster.delete(third)
        cluster.change(pod("b", PODS["b"]), ready(False), "/status")
        revision = cluster.compact()
        cluster.restart()
        picker.process.child.send_signal(signal.SIGCONT)
        self.soon(f"what happened before etcd forgot it (revision {revision}) is seen", self.has(picker, "a"), limit=20, patience=60)
        self.check("by 410 and a new list", gone() > before and lists() == listed + 1, f"410 {gone() - before:.0f}, lists {lists() - listed:.0f}")
        cluster.change(pod("b", PODS["b"]), ready(True), "/status")
        self.soon("and followed on", self.has(picker, "a", "b"))
        wait_for("contact is complete", lambda: picker.serving("kubernetes"), 60)
        picker.process.stop(signal.SIGTERM)
        self.proxy.process.stop()

    def holder(self):
        path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/epp-{NAMESPACE}-qwen.llm-d.ai"
        return self.cluster.call("GET", path)["spec"]

    def election(self):
        flags = ["--ha-enable-leader-election"]
        pickers = [self.picker(f"qwen-epp-{n}", *flags) for n in (0, 1)]
        leads = lambda p: p.process.child.poll() is None and p.serving() is True
        _, took = wait_for("one leads", lambda: any(map(leads, pickers)))
        self.check("one of two leads", sum(map(leads, pickers)) == 1, f"after {took:.1f} s")
        self.check("both live", all(p.serving("liveness") for p in pickers))
        standby = next(p for p in pickers if not leads(p))
        self.soon("the other has the endpoints too", self.has(standby, "a", "b"))
        seen = {p.metric(self.scraper, "pinpod_leader") for p in pickers}
        self.check("metrics say so", seen == {0, 1})
        proxy = self.start(Proxy(self.directory, self.given.envoy, pickers))
        wait_for("Envoy finds the leader", lambda: isinstance(proxy.ask(), dict))
        for how, limit in ((signal.SIGTERM, 6), (signal.SIGKILL, 25)):
            [leader], [standby] = [[p for p in pickers if leads(p) == it] for it in (True, False)]
            before = self.holder()
            begun = time.monotonic()
            leader.process.child.send_signal(how)
            if how == signal.SIGTERM:
                self.soon("SIGTERM: not ready at once", lambda: leader.serving() is not True)
                self.soon("SIGTERM: the lease is released", lambda: self.holder().get("holderIdentity") != before["holderIdentity"], limit=2)
            self.soon(f"{how.name}: the other leads", lambda: leads(standby), limit=limit, patience=60)
            after = self.holder()
            self.check(f"{how.name}: the record says so",
                       after["leaseTransitions"] == before["leaseTransitions"] + 1
                       and after["holderIdentity"] != before["holderIdentity"], after["leaseTransitions"])
            _, _ = wait_for("requests are answered", lambda: isinstance(proxy.ask(), dict), 60)
            print(f"       {time.monotonic() - begun:.1f} s from {how.name} until Envoy had an answer by the new leader")
            code = leader.process.child.wait(30)
            self.check(f"{how.name}: exit status", code == (0 if how == signal.SIGTERM else -9), code)
            leader.process.start()
            wait_for("it is back", lambda: leader.serving("liveness"))
            self.check("come back, it stands by", not leads(leader) and leads(standby))
        self.pickers = pickers

    def doctor(self):
        admin = self.cluster.kubeconfig("admin", "admin-token")
        [leader] = [p for p in self.pickers if p.serving()]
        # The pickers as objects: the real processes run beside the cluster.
        for n, p in enumerate(self.pickers):
            arguments = ["--pool-name=qwen", "--ha-enable-leader-election"]
            manifest = pod(p.name, f"127.2.0.{n + 1}", {"app": "qwen-epp"}, "qwen-epp", arguments)
            manifest["status"].update(ready(p is leader)["status"])
            self.apply(manifest)

        def look(*more):
            command = [self.given.pinpod, "doctor", "--json", "--kubeconfig", admin, "--namespace", NAMESPACE,
                       "--pool-name", "qwen", *more]
            found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["findings"]
            return {(f["severity"], f["check"]): f["message"] for f in found}

        found = look(f"--picker=127.0.0.1:{leader.grpc}")
        for pair in (("ok", "pool"), ("ok", "pods"), ("ok", "picker-pods"), ("ok", "lease"), ("ok", "rbac"),
                     ("warning", "gateway"), ("ok", "picker-port")):
            self.check(f"doctor: {pair[1]} is {pair[0]}", pair in found, found.get(pair, found))
        errors = [(check, text) for (severity, check), text in found.items() if severity == "error"]
        self.check("doctor: no error", not errors, errors)
        for p in self.pickers:
            p.process.stop()
        time.sleep(20)
        found = look()
        self.check("doctor: a lease nobody renews is told", ("error", "lease") in found, found.get(("error", "lease"), found))
        self.cluster.delete({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                             "metadata": {"name": "qwen-epp", "namespace": NAMESPACE}})
        wait_for("doctor misses the rights", lambda: ("error", "rbac") in look())
        self.check("doctor: lacking rights are told", True, look()[("error", "rbac")])


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--apiserver", required=True, help="a kube-apiserver")
    arguments.add_argument("--etcd", required=True, help="an etcd it can work with")
    arguments.add_argument("--envoy", default=ROOT / ".tools/envoy")
    arguments.add_argument("--pinpod", default=ROOT / "target/release/pinpod")
    arguments.add_argument("--outage", type=float, default=30, help="seconds without kube-apiserver")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Run(given, pathlib.Path(directory))
        try:
            run.cluster.start()
            version = run.cluster.call("GET", "/version")["gitVersion"]
            print(f"kube-apiserver {version}", flush=True)
            for step in (run.manifests, run.discovery, run.others, run.rules, run.metrics, run.outage, run.election, run.doctor):
                print(f"-- {step.__name__}", flush=True)
                step()
        except BaseException:
            for part in (run.cluster.etcd, run.cluster.server, *run.parts):
                if part.child:
                    print(f"== {part.name}\n{part.tail()}")
            raise
        finally:
            for part in run.parts:
                if part.child and part.child.poll() is None:
                    part.child.send_signal(signal.SIGCONT)
                    part.stop()
            run.cluster.stop()
    print("passed" if not run.failed else f"{run.failed} checks failed")
    raise SystemExit(run.failed > 0)


if __name__ == "__main__":
    main()
