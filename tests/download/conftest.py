"""A checkout with cards of its own, and a web server with the faults of real ones."""

import os
import shutil
import ssl
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
        moved: name -> address that the server redirects to.
        address: the server, encrypted.
        plain_address: the same files without encryption.
        certificate: what curl has to trust.
        asked: (name, first byte) of every GET.
    """

    def __init__(self):
        self.files, self.faults, self.ranges, self.moved, self.asked = {}, {}, True, {}, []

    def answer(self, handler, body):
        name = handler.path.lstrip("/").split("?")[0]
        content = self.files.get(name)
        requested = handler.headers.get("Range")
        start = int(requested.split("=")[1].split("-")[0]) if requested else 0
        if body:
            self.asked.append((name, start))
        if name in self.moved:
            handler.send_response(302)
            handler.send_header("Location", self.moved[name])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
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


CERTIFICATE = """
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = 127.0.0.1
[extensions]
subjectAltName = IP:127.0.0.1
basicConstraints = critical, CA:TRUE
"""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 and its key, made for this session."""
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "config").write_text(CERTIFICATE)
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -config config -keyout key.pem -out certificate.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "certificate.pem", folder / "key.pem"


def serve(handler, certificate=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *arguments: None  # a client that hangs up
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def web(certificate):
    state = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self, body=True)

        def do_HEAD(self):
            state.answer(self, body=False)

        def log_message(self, *arguments):
            pass

    servers = serve(Handler, certificate), serve(Handler)
    state.certificate = certificate[0]
    state.address = f"https://127.0.0.1:{servers[0].server_port}"
    state.plain_address = f"http://127.0.0.1:{servers[1].server_port}"
    yield state
    for server in servers:
        server.shutdown()
        server.server_close()


class Checkout:
    """A copy of download.sh with other cards; ``checkout("NAME")`` runs it."""

    def __init__(self, root, address, certificate):
        self.root, self.cache, self.address, self.certificate = root, root / "checkpoints", address, certificate
        self.hub = root / "torch" / "hub" / "checkpoints"
        (root / "particledaps" / "priors").mkdir(parents=True)
        (root / "tools").mkdir()
        shutil.copy(ROOT / "download.sh", root)
        (root / "tools" / "convert_checkpoint.py").write_text(CONVERTER)

    def card(self, name, **entries):
        facts = {"title": f"the {name}", "download": name, "file": f"{name}.pt", "licence": "MIT", "megabytes": 1}
        facts |= {"url": f"{self.address}/{name}.pt"} | entries
        lines = [f"{name}:", *(f"  {key}: {value}" for key, value in facts.items())]
        with (self.root / "particledaps" / "priors" / "cards.yaml").open("a") as file:
            file.write("\n".join(lines) + "\n\n")

    def __call__(self, *arguments, **variables):
        settings = {"TORCH_HOME": self.root / "torch", "PYTHON": sys.executable, "PARTICLEDAPS_ATTEMPTS": 2}
        settings |= {"NO_PROXY": "127.0.0.1", "CURL_CA_BUNDLE": self.certificate} | variables
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
    return Checkout(tmp_path / "my checkout", web.address, web.certificate)
