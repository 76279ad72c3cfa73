"""A Hub of this machine: answers what `huggingface_hub` asks when it makes a model repository, commits to it,
names commits, and fetches from it. Files go inline or, from a size on, by the LFS protocol.

    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
LFS_FROM = 4096
"""Bytes."""
TOKEN = "hf_of_this_machine"


@dataclass
class Repository:
    """Commits by hash, and what branches and tags point to."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, Files] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class HubServer:
    """Answers until the block ends.

    Attributes:
        refuses: called with method and path of each request; where it gives a status, that is the answer.
        answers: cleared, requests wait until it is set.
        requests: "METHOD path" of each, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuses: Callable[[str, str], int | None] = lambda method, path: None
        self.answers = threading.Event()
        self.answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, revision: str = "main") -> Files:
        found = self.repositories[repo].at(revision)
        assert found is not None, f"{repo} has no {revision}"
        return found[1]

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that are to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def hub_of(environment: Mapping[str, str]) -> Iterator[None]:
    """This process takes a server for the Hub, by its `environment`, though tests see no network."""
    with patch.dict(os.environ, environment), patch("huggingface_hub.constants.HF_HUB_OFFLINE", False):
        yield


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Not on the terminal of the tests."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.answers.wait()
        status = self.hub.refuses(self.command, path)
        if status is None and self.command != "PUT" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._say({"error": "not today"}, status=status)
            return
        for pattern, answer in _ROUTES.items():
            method, *parts = pattern.split(" ")
            match = _matched(parts, path)
            if method == self.command and match is not None:
                answer(self, body, *match)
                return
        self._say({"error": f"no such route: {self.command} {path}"}, status=404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, what: object, *, status: int = 200) -> None:
        self._send(json.dumps(what).encode(), status=status)

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _found(self, repo: str, revision: str) -> tuple[str, Files] | None:
        repository = self.hub.repositories.get(repo)
        found = None if repository is None else repository.at(revision)
        if found is None:
            missing = "RepoNotFound" if repository is None else "RevisionNotFound"
            self._send(b"{}", status=404, X_Error_Code=missing)
        return found

    # The calls.

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        known = repo in self.hub.repositories
        if not known:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.repositories[repo] = made = Repository(private=private)
            made.commit("main", {}, "initial commit")
        self._say({"url": f"{self.hub.address}/{repo}"}, status=409 if known else 200)

    def validate(self, body: bytes) -> None:
        self._say({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._found(repo, revision) is None:
            return
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._say({"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                **(
                    {}
                    if one["oid"] in self.hub.objects
                    else {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
                ),
            }
            for one in json.loads(body)["objects"]
        ]
        self._say({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid, "what arrives is what was hashed"
        self.hub.objects[oid] = body
        self._send(b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._found(repo, revision)
        if found is None:
            return
        header, *changes = [json.loads(line) for line in body.splitlines()]
        files = dict(found[1])
        for change in changes:
            value = change["value"]
            files[value["path"]] = (
                self.hub.objects[value["oid"]]
                if change["key"] == "lfsFile"
                else base64.b64decode(value["content"])
            )
        oid = self.hub.repositories[repo].commit(revision, files, header["value"]["summary"])
        url = f"{self.hub.address}/{repo}/commit/{oid}"
        self._say({"success": True, "commitOid": oid, "commitUrl": url})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        refs = self.hub.repositories[repo].refs
        known = name in refs
        refs.setdefault(name, refs["main"])
        self._say({}, status=409 if known else 200)

    def tag(self, body: bytes, repo: str, revision: str) -> None:
        found = self._found(repo, revision)
        if found is not None:
            refs, name = self.hub.repositories[repo].refs, json.loads(body)["tag"]
            known = name in refs
            refs.setdefault(name, found[0])
            self._say({}, status=409 if known else 200)

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._found(repo, revision)
        if found is not None:
            siblings = [{"rfilename": name} for name in found[1]]
            self._say({"id": repo, "sha": found[0], "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self._found(repo, revision)
        if found is not None:
            self._say(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for name, content in found[1].items()
                ]
            )

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        found = self._found(repo, revision)
        if found is None:
            return
        oid, files = found
        if name not in files:
            self._send(b"{}", status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        self._send(files[name], ETag=etag, X_Repo_Commit=oid)


_ROUTES: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    "POST /api/models/ repo /preupload/ rest": _Handler.preupload,
    "POST /api/models/ repo /commit/ rest": _Handler.commit,
    "POST /api/models/ repo /branch/ rest": _Handler.branch,
    "POST /api/models/ repo /tag/ rest": _Handler.tag,
    "POST / repo .git/info/lfs/objects/batch": _Handler.batch,
    "PUT /lfs/ rest": _Handler.store,
    "GET /api/models/ repo /revision/ rest": _Handler.info,
    "GET /api/models/ repo /tree/ rest": _Handler.tree,
    "GET /api/models/ repo": _Handler.info,
    "GET / repo /resolve/ one / rest": _Handler.resolve,
    "HEAD / repo /resolve/ one / rest": _Handler.resolve,
}
"""Parts of a path and what stands between them: `repo` has one slash, `one` none, `rest` any."""


def _matched(parts: list[str], path: str) -> list[str] | None:
    kinds = {"repo": r"([\w.-]+/[\w.-]+?)", "one": "([^/]+)", "rest": "(.+)"}
    found = re.fullmatch("".join(kinds.get(part) or re.escape(part) for part in parts), path)
    return None if found is None else list(found.groups())
