"""A server that speaks the Hugging Face Hub's HTTP API, as far as pushing and reading repositories go.

Its calls are those of huggingface_hub: create, validate-yaml, preupload, LFS (batch, PUT), commit, info,
tree, paths-info and resolve with ranges and ETags. `repositories` holds them, `requests` what was asked.
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
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # tokens: who may write, and who may only read
_REGULAR = (".json", ".jsonl", ".md")


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`fault` may answer any request with a status by its method and path; `served`: bytes by file.

    With `takes_all` it takes every file inside a commit, as it takes small ones.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}  # datasets/user/name
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.served: dict[str, int] = {}
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.takes_all = False
        self.lock = threading.Lock()

    def count(self, method: str, part: str) -> int:
        return sum(one == method and part in path for one, path in self.requests)


def _oid(path: str, data: bytes) -> str:
    """As Git names a blob, or LFS a file."""
    if path.endswith(_REGULAR) or not data:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None: ...

    def _answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path).strip("/"), parse_qs(url.query)
        self.body = self._read_body()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.server.lock:
            self.server.requests.append((self.command, path))
            if status := self.server.fault(self.command, path):
                self._answer(status, {"error": "refused"}, X_Error_Message="refused")
                return
            for method, pattern, act in _ROUTES:
                if (found := re.fullmatch(pattern, path)) and self.command in method.split():
                    act(self, *found.groups())
                    return
            self._answer(404, {"error": "no such route"})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while nbytes := int(self.rfile.readline(), 16):
            body += self.rfile.read(nbytes)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _may_write(self) -> bool:
        if self.token != WRITER:
            status = 403 if self.token == READER else 401
            self._answer(status, {"error": "no"}, X_Error_Message="You may not write here")
        return self.token == WRITER

    def _found(self, name: str) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.token not in (WRITER, READER)):
            self._missing("RepoNotFound")
            return None
        return repository

    def _json(self) -> Any:
        return json.loads(self.body)

    def create(self) -> None:
        if self._may_write():
            asked = self._json()
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            name = f"{kind}{asked['organization']}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, Repository(bool(private)))
            self._answer(status, {"url": f"{self.server.url}/{name}"})

    def validate(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def info(self, kind: str, name: str) -> None:
        if repository := self._found(_key(kind, name)):
            files = [{"rfilename": path} for path in repository.files]
            told = {"id": name, "sha": repository.sha, "private": repository.private, "siblings": files}
            self._answer(200, told)

    def preupload(self, kind: str, name: str) -> None:
        if self._may_write() and (repository := self._found(_key(kind, name))):
            answers = []
            for file in self._json()["files"]:
                path = file["path"]
                mode = "regular" if path.endswith(_REGULAR) or self.server.takes_all else "lfs"
                held = repository.files.get(path)
                oid = {} if held is None else {"oid": _oid(path, held)}
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
            self._answer(200, {"files": answers})

    def lfs_batch(self) -> None:
        if self._may_write():
            objects = []
            for asked in self._json()["objects"]:
                upload = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
                sent = asked["oid"] in self.server.blobs
                objects.append({**asked, **({} if sent else {"actions": upload})})
            self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self._answer(200)

    def commit(self, kind: str, name: str) -> None:
        if self._may_write() and (repository := self._found(_key(kind, name))):
            files = {}
            for line in self.body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
            repository.files |= files
            repository.commits.append(sorted(files))
            told = {"commitUrl": f"{self.server.url}/{_key(kind, name)}/commit/{repository.sha}"}
            self._answer(200, {**told, "commitOid": repository.sha})

    def tree(self, kind: str, name: str, folder: str | None) -> None:
        if repository := self._found(_key(kind, name)):
            start = f"{folder}/" if folder else ""
            below = [path for path in sorted(repository.files) if path.startswith(start)]
            if folder and not below:
                self._missing("EntryNotFound")
                return
            recursive, folders, entries = "true" in self.query.get("recursive", []), set[str](), []
            for path in below:
                parts = path.removeprefix(start).split("/")
                folders |= {start + "/".join(parts[:depth]) for depth in range(1, len(parts))}
                if recursive or len(parts) == 1:
                    entries.append(_entry(path, repository.files[path]))
            kept = [one for one in sorted(folders) if recursive or "/" not in one.removeprefix(start)]
            entries += [{"type": "directory", "path": one, "oid": "0" * 40, "size": 0} for one in kept]
            self._answer(200, entries)

    def paths_info(self, kind: str, name: str) -> None:
        if repository := self._found(_key(kind, name)):
            asked = parse_qs(self.body.decode())["paths"]
            found = [_entry(path, repository.files[path]) for path in asked if path in repository.files]
            self._answer(200, found)

    def resolve(self, name: str, path: str) -> None:
        if (repository := self._found(name)) is None:
            return
        if path not in repository.files:
            self._missing("EntryNotFound")
            return
        data, status, headers = repository.files[path], 200, dict[str, str]()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if start > last:
                self._answer(416)
                return
            status, headers["Content_Range"] = 206, f"bytes {start}-{last}/{len(data)}"
            data = data[start : last + 1]
        if self.command == "GET":
            self.server.served[path] = self.server.served.get(path, 0) + len(data)
        etag = f'"{_oid(path, repository.files[path])}"'
        self._answer(status, data, ETag=etag, X_Repo_Commit=repository.sha, Accept_Ranges="bytes", **headers)


def _key(kind: str, name: str) -> str:
    return f"datasets/{name}" if kind == "datasets" else name


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = _oid(path, data)
    lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 1}} if len(oid) == 64 else {}
    return {"type": "file", "path": path, "size": len(data), "oid": oid[:40], **lfs}


_REPO = r"api/(datasets|models)/([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "api/repos/create", _Handler.create),
    ("POST", "api/validate-yaml", _Handler.validate),
    ("GET", rf"{_REPO}(?:/revision/main)?", _Handler.info),
    ("POST", rf"{_REPO}/preupload/main", _Handler.preupload),
    ("POST", r".+\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"lfs/(\w+)", _Handler.lfs_put),
    ("POST", rf"{_REPO}/commit/main", _Handler.commit),
    ("GET", rf"{_REPO}/tree/main(?:/(.+))?", _Handler.tree),
    ("POST", rf"{_REPO}/paths-info/main", _Handler.paths_info),
    ("GET HEAD", r"(.+)/resolve/main/(.+)", _Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
