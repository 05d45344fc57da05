"""A stand-in of the Hub's API on this machine: as much of it as uploading a folder needs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """
    Attributes:
        endpoint: its address.
        files: content by repository and path.
        private: by repository.
        tokens: which were shown.
    """

    endpoint: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            self.private[name] = request.get("visibility", "public") == "private" or request.get("private", False)
            self.files.setdefault(name, {})
            return {"url": f"{self.endpoint}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        _, _, kind, owner, name, action, *_ = path.split("/")
        assert kind == "models", path
        repository = f"{owner}/{name}"
        if action == "preupload":
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **plain} for file in files]}
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.endpoint}/{repository}/commit/1", "commitOid": "1", "pullRequestUrl": None}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers["Authorization"])
            answer = json.dumps(hub.answer(self.path.split("?")[0], body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(endpoint=f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
