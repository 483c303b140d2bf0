"""Renders the Helm chart with every values file of tests/chart into tests/data/chart.

`cargo test` checks the rendered manifests, which needs no helm; SOURCES there is a checksum over the chart
and the values, so that a chart that was changed without rendering it again fails a test.
"""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/helm/pinpod"
VALUES = ROOT / "tests/chart"
OUTPUT = ROOT / "tests/data/chart"
# Without a cluster to ask, helm assumes an ancient one.
KUBERNETES = ["--kube-version", "1.33.0"]


def checksum():
    """FNV-1a over names and texts, as tests/compat/manifests.rs computes it."""
    files = [p for d in ("", "templates", "files") for p in (CHART / d).iterdir() if p.is_file()]
    files += VALUES.glob("*.yaml")
    state = 0xCBF29CE484222325
    for path in sorted(files, key=lambda p: p.relative_to(ROOT).parts):
        for byte in path.relative_to(ROOT).as_posix().encode() + path.read_bytes():
            state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


def main():
    helm = sys.argv[1]
    for values in sorted(VALUES.glob("*.yaml")):
        lint = [helm, "lint", "--strict", "--quiet", CHART, "--values", values, *KUBERNETES]
        subprocess.run(lint, check=True, stderr=subprocess.DEVNULL)
        command = [helm, "template", "demo", CHART, "--namespace", "llm", "--values", values]
        result = subprocess.run([*command, *KUBERNETES], capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(result.stderr)
        rendered = result.stdout
        (OUTPUT / values.name).write_text(f"# {values.name} of tests/chart, rendered.\n{rendered}")
    # What the schema of the values must refuse.
    for wrong in ("mode=sidecar", "pool.targetPorts={70000}", "pool.failureMode=FailClosed", "replica=2", "tracing.ratio=2"):
        command = [helm, "template", "demo", CHART, "--set", wrong, *KUBERNETES]
        result = subprocess.run(command, capture_output=True, text=True)
        if "don't meet the specifications of the schema" not in result.stderr:
            sys.exit(f"values.schema.json lets {wrong} pass")
    (OUTPUT / "SOURCES").write_text(checksum() + "\n")


main()
