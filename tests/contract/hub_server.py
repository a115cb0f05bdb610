"""A hub on 127.0.0.1 for the real client: the endpoints huggingface_hub 1.x needs to push and fetch a model, storing every byte.

Speaks repository creation and lookup, metadata validation, preupload, the LFS batch protocol (single-part), the ndjson
commit, and the listing and plain download of files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_contracttesttoken"


@dataclass
class Repository:
    """What the hub holds of one model repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """State of the server; ``refuse_with`` answers every request with that status."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS store: SHA-256 -> bytes."""
    requests: list[str] = field(default_factory=list)
    """``METHOD path`` of every request, in order."""
    user: str = "tester"
    refuse_with: int | None = None
    refuse_uploads: bool = False
    endpoint: str = ""


@dataclass(frozen=True)
class _File:
    """An answer that is the content of a file, not JSON."""

    content: bytes
    revision: str


_Answer = dict[str, Any] | list[dict[str, Any]] | _File


class _Refusal(Exception):
    def __init__(self, status: int, message: str, **content: str) -> None:
        super().__init__(message)
        self.status = status
        self.content = {"error": message, **content}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a fresh hub on a free port for the length of the block."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def _create_repo(hub: Hub, body: bytes, _match: re.Match[str]) -> dict[str, Any]:
    request = json.loads(body)
    repo_id = f"{request['organization'] or hub.user}/{request['name']}"
    if repo_id in hub.repositories:
        raise _Refusal(409, "You already created this model repo", url=f"{hub.endpoint}/{repo_id}")
    # Clients before 1.30 say "private": true, later ones "visibility": "private".
    private = request.get("visibility") == "private" or request.get("private") is True
    hub.repositories[repo_id] = Repository(private=private)
    return {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}


def _repository(hub: Hub, match: re.Match[str]) -> Repository:
    if match["repo"] not in hub.repositories:
        raise _Refusal(404, "Repository not found")
    return hub.repositories[match["repo"]]


def _model_info(hub: Hub, _body: bytes, match: re.Match[str]) -> dict[str, Any]:
    repository = _repository(hub, match)
    siblings = [{"rfilename": path} for path in sorted(repository.files)]
    return {"id": match["repo"], "private": repository.private, "sha": f"{len(repository.commits):040x}", "siblings": siblings}


def _tree(hub: Hub, _body: bytes, match: re.Match[str]) -> list[dict[str, Any]]:
    files = sorted(_repository(hub, match).files.items())
    return [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in files]


def _download(hub: Hub, _body: bytes, match: re.Match[str]) -> _File:
    repository = _repository(hub, match)
    if match["path"] not in repository.files:
        raise _Refusal(404, "Entry not found")
    return _File(repository.files[match["path"]], match["revision"])


def _validate_yaml(_hub: Hub, body: bytes, _match: re.Match[str]) -> dict[str, Any]:
    if not json.loads(body)["content"].startswith("---\n"):
        return {"errors": [], "warnings": [{"message": "empty metadata"}]}
    return {"errors": [], "warnings": []}


def _preupload(hub: Hub, body: bytes, match: re.Match[str]) -> dict[str, Any]:
    _repository(hub, match)
    files = json.loads(body)["files"]
    return {
        "files": [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
            for f in files
        ]
    }


def _lfs_batch(hub: Hub, body: bytes, match: re.Match[str]) -> dict[str, Any]:
    _repository(hub, match)
    request = json.loads(body)
    assert request["operation"] == "upload" and request["hash_algo"] == "sha256"
    answers = []
    for item in request["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.objects:
            answer["actions"] = {
                "upload": {"href": f"{hub.endpoint}/objects/{item['oid']}"},
                "verify": {"href": f"{hub.endpoint}/objects/{item['oid']}/verify"},
            }
        answers.append(answer)
    return {"transfer": "basic", "objects": answers}


def _put_object(hub: Hub, body: bytes, match: re.Match[str]) -> dict[str, Any]:
    if hub.refuse_uploads:
        raise _Refusal(403, "storage refused")
    if hashlib.sha256(body).hexdigest() != match["oid"]:
        raise _Refusal(400, "the bytes do not match their SHA-256")
    hub.objects[match["oid"]] = body
    return {}


def _verify_object(hub: Hub, body: bytes, match: re.Match[str]) -> dict[str, Any]:
    claim = json.loads(body)
    if claim["oid"] != match["oid"] or len(hub.objects[match["oid"]]) != claim["size"]:
        raise _Refusal(400, "the stored object differs")
    return {}


def _commit(hub: Hub, body: bytes, match: re.Match[str]) -> dict[str, Any]:
    repository = _repository(hub, match)
    summary = ""
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            summary = value["summary"]
        elif entry["key"] == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            repository.files[value["path"]] = hub.objects[value["oid"]]
        else:
            raise _Refusal(400, f"unknown operation {entry['key']}")
    repository.commits.append(summary)
    oid = f"{len(repository.commits):040x}"
    return {"commitUrl": f"{hub.endpoint}/{match['repo']}/commit/{oid}", "commitOid": oid, "success": True}


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, str, Callable[[Hub, bytes, re.Match[str]], _Answer]]] = [
    ("POST", r"/api/repos/create", _create_repo),
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("GET", rf"/api/models/{_REPO}(/revision/[^/]+)?", _model_info),
    ("GET", rf"/api/models/{_REPO}/tree/[^/]+", _tree),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _download),
    ("POST", rf"/api/models/{_REPO}/preupload/main", _preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _put_object),
    ("POST", r"/objects/(?P<oid>[0-9a-f]{64})/verify", _verify_object),
    ("POST", rf"/api/models/{_REPO}/commit/main", _commit),
]
# The object store hands out pre-signed addresses, which carry no token.
_NEEDS_NO_TOKEN = re.compile(r"/objects/[0-9a-f]{64}")


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence: pytest shows what failed, the request list what was asked."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.state.requests.append(f"{self.command} {path}")
        try:
            self._answer(200, self._dispatch(path, body), {})
        except _Refusal as refusal:
            self._answer(refusal.status, refusal.content, {"X-Error-Message": str(refusal)})

    def _dispatch(self, path: str, body: bytes) -> _Answer:
        if self.state.refuse_with is not None:
            raise _Refusal(self.state.refuse_with, "refused by the test")
        if not _NEEDS_NO_TOKEN.fullmatch(path) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                return handle(self.state, body, match)
        raise _Refusal(501, f"this hub does not speak {self.command} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, answer: _Answer, headers: dict[str, str]) -> None:
        if isinstance(answer, _File):
            payload = answer.content
            headers = {"ETag": f'"{hashlib.sha1(payload).hexdigest()}"', "X-Repo-Commit": answer.revision}
        else:
            payload = json.dumps(answer).encode()
            headers = {**headers, "Content-Type": "application/json"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)
