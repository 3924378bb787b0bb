"""A Hub on the loopback, of the standard library: what huggingface_hub needs to create, push and load models.

It keeps everything in memory, one dictionary of files a branch, and forgets nothing it was asked: `requests` holds
"METHOD path" of every request. Clients read HF_ENDPOINT when they are imported, so they run in processes of their own,
with `client_environment`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_local"


class LocalHub(ThreadingHTTPServer):
    """`with LocalHub() as hub:` serves on a free port until the block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}  # id -> {"private": bool, "branches": {name: sha}, "commits": {}}
        self.objects: dict[str, bytes] = {}  # sha256 -> content of large files
        self.requests: list[str] = []
        self.breaks_once = False  # the next large file does not arrive

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo]["commits"][self.repos[repo]["branches"][revision]]

    def client_environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What to add to a client's environment; its cache is empty and no other endpoint is known."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return environment | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((branch, sorted(files), len(self.requests))).encode()).hexdigest()
        self.repos[repo]["commits"][sha] = files
        self.repos[repo]["branches"][branch] = sha
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names that http.server calls

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self._send({"name": "me", "type": "user", "orgs": []})
        if path.startswith("/objects/"):
            return self._store(path.split("/")[-1], body)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        if repo not in self.server.repos or not self._may_see(repo):
            return self._send({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["info"]:
            return self._lfs_batch(json.loads(body))
        if rest[:1] == ["resolve"]:
            return self._resolve(repo, rest[1], "/".join(rest[2:]))
        return self._api(repo, rest, body)

    def _may_see(self, repo: str) -> bool:
        return not self.server.repos[repo]["private"] or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid credentials"}, 401)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "id": repo}
        if repo in self.server.repos:
            return self._send({"error": "You already created this repo", **answer}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repos[repo] = {"private": private, "branches": {}, "commits": {}}
        self.server.commit(repo, "main", {})
        return self._send(answer)

    def _store(self, sha256: str, body: bytes) -> None:
        if self.server.breaks_once:
            self.server.breaks_once = False
            return self._send({"error": "the connection broke"}, 400)
        if hashlib.sha256(body).hexdigest() != sha256:
            return self._send({"error": "wrong content"}, 422)
        self.server.objects[sha256] = body
        return self._send({})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        answer = []
        for item in wanted["objects"]:
            known = item["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
            answer.append({**item, **({} if known else {"actions": upload})})
        return self._send({"transfer": "basic", "objects": answer})

    def _api(self, repo: str, rest: list[str], body: bytes) -> None:
        store = self.server.repos[repo]
        if rest[:1] == ["preupload"]:
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for item in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        if rest[:1] == ["branch"]:
            if rest[1] in store["branches"]:
                return self._send({"error": "Reference already exists"}, 409)
            store["branches"][rest[1]] = store["branches"]["main"]
            return self._send({}, 201)
        if rest[:1] == ["commit"]:
            return self._commit(repo, rest[1], [json.loads(line) for line in body.splitlines()])
        if rest[:1] == ["refs"]:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in store["branches"].items()
            ]
            return self._send({"branches": branches, "tags": [], "converts": []})
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        sha = store["branches"].get(revision, revision)
        if sha not in store["commits"]:
            return self._send({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = store["commits"][sha]
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
                if name.startswith(folder)
            ]
            if folder and not tree:
                return self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self._send(tree)
        siblings = [{"rfilename": name} for name in files]
        return self._send(
            {"id": repo, "modelId": repo, "sha": sha, "private": store["private"], "siblings": siblings, "tags": []}
        )

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        branches = self.server.repos[repo]["branches"]
        if branch not in branches:
            return self._send({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = dict(self.server.repos[repo]["commits"][branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        sha = self.server.commit(repo, branch, files)
        return self._send({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        store = self.server.repos[repo]
        sha = store["branches"].get(revision, revision)
        if sha not in store["commits"]:
            return self._send({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        content = store["commits"][sha].get(name)
        commit = {"X-Repo-Commit": sha}
        if content is None:
            return self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
        etag = hashlib.sha256(content).hexdigest()
        headers = {**commit, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(content[start:], 206 if wanted else 200, headers)

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
