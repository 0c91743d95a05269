"""A server on the loopback address that speaks the hub's calls, as far as its client needs them.

Repositories are folders ``OWNER/NAME`` of one folder. It answers what ``huggingface_hub`` asks when
HF_ENDPOINT names it:

- ``GET /api/models/NAME[/revision/REVISION]``: the files with sizes and blob ids;
- ``GET /api/models/NAME/tree/REVISION``: the same as a list;
- ``HEAD`` and ``GET /NAME/resolve/REVISION/FILE``, with ranges.

Every model has the revision ``main`` and its commit's hash. Names in ``gated`` and ``broken`` are
refused as the hub does it; ``requests`` and ``sent`` tell what was asked, and how many bytes went
out.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves a folder of models."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.sent = 0

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+|[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        asked = info or tree or file
        name, revision = (asked[1], asked[2] or "main") if asked else ("", "main")
        folder = self.server.folder / name
        if name in self.server.broken:
            self._send(503, b"", {})
        elif name in self.server.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif not name or "/" not in name or not folder.is_dir():
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "none"})
        elif revision not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "none"})
        elif info:
            self._send(200, json.dumps(_info(name, folder)).encode(), {})
        elif tree and tree[3]:  # of a folder in it: no model here has one
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "none"})
        elif tree:
            self._send(200, json.dumps(_tree(folder)).encode(), {})
        elif file:
            self._file(folder / file[3])

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "none"})
            return
        content = path.read_bytes()
        headers = {
            "ETag": f'"{_blob(path)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.server.sent += len(content)
            self.wfile.write(content)


def _info(name: str, folder: Path) -> dict[str, object]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    siblings = [
        {
            "rfilename": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "blobId": _blob(path),
        }
        for path in files
    ]
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": _blob(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def _blob(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(1 << 16)
    text = start + str(path.stat().st_size).encode()
    return hashlib.sha1(text, usedforsecurity=False).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[HubServer]:
    """Serve a folder of models until the block ends."""
    server = HubServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
