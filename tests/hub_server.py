"""A Hub on loopback: as much of its HTTP interface as downloading, creating and committing small files needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34


@dataclass
class Repo:
    """Commits newest first; a commit is a snapshot of all files. ``refs`` names some of them besides main."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    drop: bool = False  # close the connection in the middle of every body
    full: bool = False  # refuse commits

    def commit(self, **files: bytes) -> str:
        self.files = {**self.files, **files}
        sha = hashlib.sha1(repr((sorted(self.files.items()), len(self.history))).encode()).hexdigest()
        self.history[sha] = self.files
        self.refs["main"] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.history else None


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self._body()
        match self._parts():
            case ["api", "repos", "create"]:
                data = json.loads(body)
                name = f"{data['organization']}/{data['name']}" if data.get("organization") else f"me/{data['name']}"
                exists = name in self.server.repos
                if not exists:
                    self.server.repos[name] = Repo(
                        private=data.get("visibility") == "private" or data.get("private") is True
                    )
                    self.server.repos[name].commit()
                self._json({"url": f"{self.server.url}/{name}", "name": name}, status=409 if exists else 200)
            case ["api", "models", org, name, "preupload", _]:
                if self._repo(f"{org}/{name}", write=True) is not None:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
            case ["api", "models", org, name, "commit", _]:
                if (repo := self._repo(f"{org}/{name}", write=True)) is not None:
                    if repo.full:
                        return self._error(403, None, "No space left in this account")
                    lines = [json.loads(line) for line in body.splitlines()]
                    files = [line["value"] for line in lines if line["key"] == "file"]
                    sha = repo.commit(**{f["path"]: base64.b64decode(f["content"]) for f in files})
                    url = f"{self.server.url}/{org}/{name}/commit/{sha}"
                    self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case _:
                self._error(404, "RepoNotFound", "Repository not found")

    def _get(self) -> None:
        match self._parts():
            case ["api", "whoami-v2"]:
                self._json({"name": "me", "type": "user"}) if self._authorised() else self._error(401, None, "Who?")
            case ["api", "models", org, name, *rest]:
                if (repo := self._repo(f"{org}/{name}")) is not None:
                    sha = repo.resolve(rest[1] if rest[:1] == ["revision"] else "main")
                    if sha is None:
                        return self._error(404, "RevisionNotFound", "Revision Not Found")
                    self._json({"id": f"{org}/{name}", "sha": sha, "siblings": [{"rfilename": f} for f in repo.files]})
            case [org, name, "resolve", revision, *path]:
                if (repo := self._repo(f"{org}/{name}")) is not None:
                    self._file(repo, revision, "/".join(path))
            case _:
                self._error(404, "RepoNotFound", "Repository not found")

    def _file(self, repo: Repo, revision: str, path: str) -> None:
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", "Revision Not Found")
        if (content := repo.history[sha].get(path)) is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}, repo.drop)

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or an answer that does not tell a private one from none, as the Hub gives."""
        repo = self.server.repos.get(name)
        if repo is not None and (self._authorised() or not (repo.private or write)):
            return repo
        # The Hub sends no code with 401; the client then goes by the address, which it knows with https only.
        self._error(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        return None

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _parts(self) -> list[str]:
        self.server.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **extra})

    def _send(self, status: int, content: bytes, headers: dict[str, str], drop: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if drop else content)
        if drop:
            self.close_connection = True
