"""A model hub on this machine, in a thread: as much of the hub's HTTP interface as its own client asks for when it pushes and
loads, and the failures that a test orders."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by their number, and the branches that point at them."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files), branch)).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens instead of an answer, so many times: to requests whose `METHOD path` holds a pattern."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: str = ""
    """before: the connection ends without an answer · half: in the middle of the body · after: it was done, and nobody hears it."""
    do: Callable[[], None] | None = None
    """Done first; with neither status nor cut, the request is then answered as ever."""
    times: int = 1


class Cut(Exception):
    """The connection is gone."""


class Hub:
    """The hub's state, and the server that speaks for it."""

    def __init__(self, large: int = 10_000, part: int = 0) -> None:
        """
        Args:
            large: files from this size on, and weights, go by LFS.
            part: large files come in parts of this size; 0, whole.
        """
        self.large, self.part = large, part
        self.token = "hf_made_up_for_tests"
        self.repos: dict[str, Repo] = {}
        self.objects: Files = {}
        self.parts: dict[str, Files] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.received = 0
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()

    def files(self, repo: str, branch: str = "main") -> Files:
        """What a branch shows."""
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    def make(self, repo: str, private: bool = True, files: Files | None = None) -> Repo:
        self.repos[repo] = Repo(private)
        self.repos[repo].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return self.repos[repo]

    def asked(self, pattern: str) -> int:
        """How many requests hold a pattern."""
        return sum(bool(re.search(pattern, line)) for line in self.log)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # else each answer waits 40 ms for an acknowledgement of its first half

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    # ------------------------------------------------------------------------------------------------ one request

    def _serve(self) -> None:
        hub, url = self.state, urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        with hub.lock:
            hub.log.append(line)
            fault = next((one for one in hub.faults if one.times and re.search(one.pattern, line)), None)
            if fault:
                fault.times -= 1
        try:
            if fault and fault.do:
                fault.do()
            if fault and fault.cut == "before":
                raise Cut
            body = self._body(half=bool(fault and fault.cut == "half"))
            if fault and fault.status:
                return self._answer(fault.status, {"error": "ordered"}, fault.headers)
            status, said, headers = self._route(unquote(url.path), parse_qs(url.query), body)
            if fault and fault.cut == "after":
                raise Cut
            self._answer(status, said, headers)
        except Cut:
            self.close_connection = True
            self.connection.close()

    def _body(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    raise Cut
            self.rfile.readline()
        else:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size // 2 if half else size)
            if half:
                raise Cut
        self.state.received += len(body)
        return body

    def _answer(self, status: int, said: Any, headers: dict[str, str] | None = None) -> None:
        raw = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    # ------------------------------------------------------------------------------------------------ what is asked

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub = self.state
        if path.startswith("/lfs/"):  # a signed address: no token
            return self._upload(path.removeprefix("/lfs/"), query, body)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return 401, {"error": "Invalid username or password."}, {}
        with hub.lock:
            for method, pattern, answer in (
                ("POST", r"/api/repos/create", self._create),
                ("POST", r"/api/validate-yaml", self._validate),
                ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self._preupload),
                ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", self._commit),
                ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", self._branch),
                ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?", self._tree),
                ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<revision>.+))?", self._info),
                ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
            ):
                if self.command in method.split("|") and (found := re.fullmatch(pattern, path)):
                    return answer(found.groupdict(), body)
        return 404, {"error": f"no such address here: {path}"}, {}

    def _create(self, _: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repos:
            return 409, {"error": "You already created this model repo"}, {}
        self.state.make(name, asked.get("visibility") == "private")
        return 200, {"url": f"{self.state.url}/{name}", "id": name}, {}

    def _validate(self, _: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        content = json.loads(body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            held = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        good = isinstance(held, dict)
        return (200 if good else 400), {"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, {}

    def _repo(self, asked: dict[str, str]) -> tuple[Repo, str, str] | tuple[int, Any, dict[str, str]]:
        """(repository, branch or commit, commit), or the answer that there is none."""
        repo, revision = self.state.repos.get(asked["repo"]), asked.get("revision") or "main"
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if (commit := repo.at(revision)) is None:
            return 404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"}
        return repo, revision, commit

    def _info(self, asked: dict[str, str], _: bytes) -> tuple[int, Any, dict[str, str]]:
        found = self._repo(asked)
        if isinstance(found[0], int):
            return found  # type: ignore[return-value]
        repo, _revision, commit = found
        siblings = [{"rfilename": name} for name in repo.commits[commit]]
        return 200, {"id": asked["repo"], "sha": commit, "private": repo.private, "siblings": siblings}, {}

    def _tree(self, asked: dict[str, str], _: bytes) -> tuple[int, Any, dict[str, str]]:
        found = self._repo(asked)
        if isinstance(found[0], int):
            return found  # type: ignore[return-value]
        files = found[0].commits[found[2]]
        return 200, [{"type": "file", "path": name, "size": len(raw), "oid": git_hash(raw)} for name, raw in files.items()], {}

    def _preupload(self, asked: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        found = self._repo(asked)
        if isinstance(found[0], int):
            return found  # type: ignore[return-value]
        there, answers = found[0].commits[found[2]], []
        ignored = there.get(".gitignore", b"").decode().split()
        for one in json.loads(body)["files"]:
            large = self._is_large(one["path"], one["size"])
            held = there.get(one["path"])
            oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_hash(held)
            answers.append(
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": one["path"] in ignored,
                    "oid": oid,
                }
            )
        return 200, {"files": answers}, {}

    def _is_large(self, path: str, size: int) -> bool:
        return path.endswith(".safetensors") or size >= self.state.large * 100

    def _batch(self, asked: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for one in json.loads(body)["objects"]:
            oid, size, part = one["oid"], one["size"], self.state.part
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.state.objects:
                upload: dict[str, Any] = {"href": f"{self.state.url}/lfs/{oid}"}
                if part and size > part:
                    count = -(-size // part)
                    numbered = {str(n + 1): f"{self.state.url}/lfs/{oid}?part={n + 1}" for n in range(count)}
                    upload = {"href": f"{self.state.url}/lfs/{oid}?complete=1", "header": {"chunk_size": str(part), **numbered}}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        return 200, {"transfer": "multipart" if self.state.part else "basic", "objects": objects}, {}

    def _upload(self, oid: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        with self.state.lock:
            if "part" in query:
                self.state.parts.setdefault(oid, {})[query["part"][0]] = body
                return 200, b"", {"ETag": f'"{git_hash(body)}"'}
            if "complete" in query:
                parts = self.state.parts.pop(oid)
                body = b"".join(parts[key] for key in sorted(parts, key=int))
            if hashlib.sha256(body).hexdigest() != oid:
                return 422, {"error": "the content is not what was announced"}, {}
            self.state.objects[oid] = body
            return 200, b"", {}

    def _commit(self, asked: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        found = self._repo(asked)
        if isinstance(found[0], int):
            return found  # type: ignore[return-value]
        repo, branch, head = found
        lines = [json.loads(line) for line in body.splitlines()]
        if (parent := lines[0]["value"].get("parentCommit")) and parent != head:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.state.objects:
                        return 400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"}, {}
                    files[value["path"]] = self.state.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        made = repo.commit(branch, files)
        url = f"{self.state.url}/{asked['repo']}/commit/{made}"
        return 200, {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""}, {}

    def _branch(self, asked: dict[str, str], _: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self.state.repos[asked["repo"]]
        if asked["revision"] in repo.branches:
            return 409, {"error": "Reference already exists"}, {}
        repo.branches[asked["revision"]] = repo.branches["main"]
        return 200, b"", {}

    def _resolve(self, asked: dict[str, str], _: bytes) -> tuple[int, Any, dict[str, str]]:
        found = self._repo(asked)
        if isinstance(found[0], int):
            return found  # type: ignore[return-value]
        commit = {"X-Repo-Commit": found[2]}
        raw = found[0].commits[found[2]].get(asked["file"])
        if raw is None:
            return 404, {"error": "Entry not found"}, commit | {"X-Error-Code": "EntryNotFound"}
        return 200, raw, commit | {"ETag": f'"{git_hash(raw)}"'}


def git_hash(raw: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(f"blob {len(raw)}\0".encode() + raw).hexdigest()


def as_the_hub(made: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waited: list[float]) -> Hub:
    """Make huggingface_hub, in this process, take a hub for the hub; what it would wait is kept instead."""
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants

    changes = {
        "ENDPOINT": made.url, "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no_token"), "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", made.token)
    monkeypatch.setattr(http, "time", types.SimpleNamespace(sleep=waited.append))
    return made
