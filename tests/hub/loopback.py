"""A Hugging Face Hub on this machine: of its HTTP API, what huggingface_hub uses to create, upload and download models.

Repositories with branches and commits, small files inside commits and large ones through Git LFS, private ones for
those with the token. What is kept can be looked at; requests can be made to fail.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34
LFS = (".safetensors", ".png")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, bytes]
    parent: str

    @property
    def oid(self) -> str:
        content = {name: hashlib.sha1(data).hexdigest() for name, data in self.files.items()}
        return hashlib.sha1(json.dumps([self.title, content, self.parent]).encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]

    def commit(self, revision: str) -> Commit | None:
        """The last commit of a branch, or the one of this hash."""
        every = [commit for commits in self.branches.values() for commit in commits]
        return (
            self.branches[revision][-1] if revision in self.branches else _first(c for c in every if c.oid == revision)
        )


@dataclass
class Hub:
    """What a Hub keeps, and what it has been asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS objects by their SHA-256
    requests: list[tuple[str, str]] = field(default_factory=list)  # methods and paths
    failures: list[tuple[str, str, int]] = field(default_factory=list)  # method, part of the path, status: each once

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return self.repos[repo].commit(revision).files

    def count(self, method: str, part: str) -> int:
        """How many such requests came."""
        return sum(done == method and part in path for done, path in self.requests)


@contextmanager
def loopback():
    """Run a Hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Refused(Exception):
    """An answer that is an error: status and the Hub's code for it."""

    def __init__(self, status: int, code: str = ""):
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            failure = _first(f for f in self.hub.failures if f[0] == self.command and f[1] in path)
            if failure:
                self.hub.failures.remove(failure)
                raise Refused(failure[2])
            for methods, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    return answer(self, **match.groupdict())
            raise Refused(404)
        except Refused as refused:
            return self._send(b"{}", refused.status, {"X-Error-Code": refused.code, "X-Error-Message": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content, status: int = 200):
        self._send(json.dumps(content).encode(), status)

    def _may_write(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401)

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refused(401 if repo else 404, "RepoNotFound")
        return repo

    def _commit(self, name: str, revision: str) -> Commit:
        commit = self._repo(name).commit(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound")
        return commit

    def create(self):
        self._may_write()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        private = asked.get("private") or asked.get("visibility") == "private"
        first = Commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, "")
        self.hub.repos.setdefault(name, Repo(private, {"main": [first]}))
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def branch(self, repo: str, branch: str):
        self._may_write()
        branches = self._repo(repo).branches
        status = 409 if branch in branches else 200
        branches.setdefault(branch, list(branches["main"]))
        self._json({}, status)

    def info(self, repo: str, revision: str = "main"):
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        self._json({"id": repo, "sha": commit.oid, "private": self._repo(repo).private, "siblings": siblings})

    def tree(self, repo: str, revision: str):
        self._json([_entry(name, data) for name, data in self._commit(repo, revision).files.items()])

    def preupload(self, repo: str, revision: str):
        self._may_write()
        there = self._commit(repo, revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            mode, old = "lfs" if file["path"].endswith(LFS) else "regular", there.get(file["path"])
            oid = None if old is None else _oid(old, mode == "lfs")
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, repo: str):
        self._may_write()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.blobs else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400)
        self.hub.blobs[oid] = self.body
        self._json({})

    def commit(self, repo: str, revision: str):
        self._may_write()
        last = self._commit(repo, revision)
        files, title = dict(last.files), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        new = Commit(title, files, last.oid)
        self._repo(repo).branches[revision].append(new)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{new.oid}", "commitOid": new.oid})

    def resolve(self, repo: str, revision: str, file: str):
        commit = self._commit(repo, revision)
        if file not in commit.files:
            raise Refused(404, "EntryNotFound")
        data = commit.files[file]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_oid(data, file.endswith(LFS))}"', "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(data[first : last + 1], 206, headers)
        return self._send(data, 200, headers)


ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", lambda self: self._json({"errors": [], "warnings": []})),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("GET", rf"/api/models/{REPO}", _Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


def _entry(name: str, data: bytes) -> dict:
    lfs = {"lfs": {"oid": _oid(data, True), "size": len(data), "pointerSize": 134}} if name.endswith(LFS) else {}
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data, False)} | lfs


def _oid(data: bytes, lfs: bool) -> str:
    """SHA-256 of an LFS object, else what Git calls a file."""
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _first(each):
    return next(each, None)
