"""Builds kube-apiserver from its Go module: `python3 tests/kube_apiserver.py VERSION OUTPUT`.

The module replaces its own libraries by directories that a module archive leaves out; they are published
under versions of their own, which take their place here. Takes some ten minutes of a core the first time.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile


def main():
    version, output = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    major, minor, patch = version.split(".")
    environment = {**os.environ, "GOFLAGS": "-mod=mod -buildvcs=false", "CGO_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)

        def go(*arguments):
            command = ["go", *arguments]
            return subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.PIPE).stdout

        module = json.loads(go("mod", "download", "-json", f"k8s.io/kubernetes@v{version}"))
        source = pathlib.Path(module["Dir"])
        text = (source / "go.mod").read_text().replace("module k8s.io/kubernetes", "module apiserver", 1)
        library = f"v0.{minor}.{patch}"
        text = re.sub(r"(k8s\.io/\S+) v0\.0\.0$", rf"\1 {library}", text, flags=re.M)
        text = re.sub(r"^\t(k8s\.io/\S+) => \./staging/\S+$", rf"\t\1 => \1 {library}", text, flags=re.M)
        text = text.replace("require (", f"require (\n\tk8s.io/kubernetes v{version}", 1)
        (directory / "go.mod").write_text(text)
        shutil.copy(source / "go.sum", directory)
        shutil.copy(source / "cmd/kube-apiserver/apiserver.go", directory / "main.go")
        names = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
        flags = ["-s", "-w", *(f"-X k8s.io/component-base/version.{name}={value}" for name, value in names.items())]
        made = directory / "kube-apiserver"
        # One package at a time: the largest ones take gigabytes.
        go("build", "-p", "1", "-trimpath", "-gcflags=all=-c=1", "-ldflags", " ".join(flags), "-o", str(made), ".")
        subprocess.run([made, "--version"], check=True)
        output.parent.mkdir(exist_ok=True)
        shutil.move(made, output)


main()
