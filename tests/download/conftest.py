"""A checkout with cards of its own, and a web server with the faults of real ones."""

import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERTER = """
import sys, pathlib
source, out = map(pathlib.Path, sys.argv[1:])
if source.read_bytes() == b"bad":
    sys.exit("no such architecture")
out.mkdir()
(out / "card.json").write_text(source.name)
"""


class Web:
    """Files by name, and how the server treats each of them.

    Attributes:
        files: name -> content.
        faults: name -> list of faults, one a request: an HTTP status, ``short`` (breaks off half way).
        ranges: whether the server can resume.
        asked: (name, first byte) of every GET.
    """

    def __init__(self):
        self.files, self.faults, self.ranges, self.asked = {}, {}, True, []

    def answer(self, handler, body):
        name = handler.path.lstrip("/").split("?")[0]
        content = self.files.get(name)
        requested = handler.headers.get("Range")
        start = int(requested.split("=")[1].split("-")[0]) if requested else 0
        if body:
            self.asked.append((name, start))
        fault = self.faults[name].pop(0) if body and self.faults.get(name) else None
        if content is None or isinstance(fault, int):
            handler.send_error(404 if content is None else fault)
            return
        start = start if self.ranges else 0
        if start >= len(content) > 0:
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        if body:
            rest = content[start:]
            handler.wfile.write(rest[: len(rest) // 2] if fault == "short" else rest)


@pytest.fixture
def web():
    state = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self, body=True)

        def do_HEAD(self):
            state.answer(self, body=False)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


class Checkout:
    """A copy of download.sh with other cards; ``checkout("NAME")`` runs it."""

    def __init__(self, root, address):
        self.root, self.cache, self.address = root, root / "checkpoints", address
        self.hub = root / "torch" / "hub" / "checkpoints"
        (root / "priors").mkdir(parents=True)
        (root / "tools").mkdir()
        shutil.copy(ROOT / "download.sh", root)
        (root / "tools" / "convert_checkpoint.py").write_text(CONVERTER)

    def card(self, name, **entries):
        facts = {"title": f"the {name}", "download": name, "file": f"{name}.pt", "licence": "MIT", "megabytes": 1}
        facts |= {"url": f"{self.address}/{name}.pt"} | entries
        lines = [f"{name}:", *(f"  {key}: {value}" for key, value in facts.items())]
        with (self.root / "priors" / "cards.yaml").open("a") as file:
            file.write("\n".join(lines) + "\n\n")

    def __call__(self, *arguments, **variables):
        settings = {"TORCH_HOME": self.root / "torch", "PYTHON": sys.executable, "PARTICLEDAPS_ATTEMPTS": 2}
        settings |= {"NO_PROXY": "127.0.0.1"} | variables
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PARTICLEDAPS")}
        environment = inherited | {k: str(v) for k, v in settings.items()}
        command = ["bash", str(self.root / "download.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.root.parent)

    def left(self, folder=None):
        """Names of everything in the cache, hidden files too."""
        folder = folder or self.cache
        return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def checkout(tmp_path, web):
    return Checkout(tmp_path / "my checkout", web.address)
