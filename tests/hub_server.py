"""A small Hub in memory: what `huggingface_hub` asks of a server to create, fill and read repositories of models.

Clients are told where it is by `HF_ENDPOINT`, which is read on import: they run in processes of their own, with
`HubServer.environment`. Whatever else they ask for is answered by 501, so that a test shows what is missing here.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


USERS = {"hf_token_of_user": "user", "hf_token_of_another": "another"}
LARGEST_REGULAR_FILE = 10_000  # bytes, of a file that is no text


class HubError(Exception):
    """An answer other than success; `code` is what the client tells one kind of 404 from another by."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """What clients compare with their own file: its SHA-256 if it is large, Git's SHA-1 if not."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        large = {"lfs": {"oid": self.oid, "size": size, "pointerSize": 127}} if self.is_large else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": size, **large}


class Repository:
    """Files of each revision, the newest last, and large files that came in, part of a revision or not yet."""

    def __init__(self, private: bool = False):
        self.private = private
        self.large_files: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.revisions: dict[str, dict[str, Blob]] = {"0" * 40: {}}

    @property
    def head(self) -> str:
        return list(self.revisions)[-1]

    def files(self, revision: str = "main") -> dict[str, Blob]:
        if revision not in ("main", *self.revisions):
            raise HubError(404, "RevisionNotFound")
        return self.revisions[self.head if revision == "main" else revision]

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.files(revision)[path].content

    def commit(self, lines: Iterable[dict[str, Any]]) -> None:
        """Adds a revision if every line can be done, and changes nothing otherwise."""
        with self.lock:
            files = dict(self.files())
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header" and value.get("parentCommit", self.head) != self.head:
                    raise HubError(412, message="The parent is not the newest commit.")
                if key == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), is_large=False)
                elif key == "lfsFile":
                    if value["oid"] not in self.large_files:
                        raise HubError(400, message=f"The content of {value['path']} was not uploaded.")
                    files[value["path"]] = Blob(self.large_files[value["oid"]], is_large=True)
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key != "header":
                    raise HubError(501, message=f"Commits with {key} are not implemented.")
            history = json.dumps([self.head, *((path, blob.oid) for path, blob in files.items())])
            self.revisions[hashlib.sha1(history.encode()).hexdigest()] = files


ROUTES: list[tuple[str, re.Pattern, Callable[..., Any]]] = []
REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[\w.-]+)"


def route(methods: str, pattern: str) -> Callable:
    """Registers a method of `Handler`, whose arguments are the groups of the pattern, and whose result is sent."""

    def register(function: Callable) -> Callable:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    server: "HubServer"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @route("GET", r"/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise HubError(401)
        return {"type": "user", "name": self.user, "orgs": []}

    @route("POST", r"/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @route("POST", r"/api/repos/create")
    def create_repository(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self.check_owner(name)
        exists = name in self.server.repositories
        if not exists:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories[name] = Repository(private)
        self.send(409 if exists else 200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    @route("GET", rf"/api/models/{REPOSITORY}(/revision/{REVISION})?")
    def information(self, name: str, revision: str | None):
        repository = self.repository(name)
        siblings = [{"rfilename": path} for path in repository.files(revision or "main")]
        revision = repository.head if revision in (None, "main") else revision
        return {"id": name, "sha": revision, "private": repository.private, "siblings": siblings}

    @route("GET", rf"/api/models/{REPOSITORY}/tree/{REVISION}")
    def tree(self, name: str, revision: str):
        if self.query.get("recursive") != ["true"]:
            raise HubError(501, message="Listing one folder is not implemented.")
        return [blob.entry(path) for path, blob in self.repository(name).files(revision).items()]

    @route("POST", rf"/api/models/{REPOSITORY}/preupload/{REVISION}")
    def preupload(self, name: str, revision: str):
        files = self.repository(name, write=True).files(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path, is_binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            is_large = path.endswith(".safetensors") or (is_binary and file["size"] > LARGEST_REGULAR_FILE)
            answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": files[path].oid if path in files else None})
        return {"files": answers}

    @route("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch")
    def large_file_batch(self, name: str):
        repository, url = self.repository(name, write=True), f"{self.server.endpoint}/{name}/large"
        answers = []
        for file in json.loads(self.body)["objects"]:
            if file["oid"] not in repository.large_files:  # clients skip what is here already
                actions = {"upload": {"href": f"{url}/{file['oid']}"}, "verify": {"href": f"{url}/verify"}}
                file = {**file, "actions": actions}
            answers.append(file)
        return {"transfer": "basic", "objects": answers}

    @route("PUT", rf"/{REPOSITORY}/large/(?P<oid>[0-9a-f]{{64}})")
    def upload_large_file(self, name: str, oid: str):
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length // 2)
        self.server.half_way(name)
        content += self.rfile.read(length - len(content))
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, message="The content is not what was announced.")
        self.server.repositories[name].large_files[oid] = content
        return {}

    @route("POST", rf"/{REPOSITORY}/large/verify")
    def verify_large_file(self, name: str):
        if json.loads(self.body)["oid"] not in self.repository(name, write=True).large_files:
            raise HubError(404, "EntryNotFound")
        return {}

    @route("POST", rf"/api/models/{REPOSITORY}/commit/main")
    def commit(self, name: str):
        repository = self.repository(name, write=True)
        repository.commit(json.loads(line) for line in self.body.splitlines())
        url = f"{self.server.endpoint}/{name}/commit/{repository.head}"
        return {"success": True, "commitOid": repository.head, "commitUrl": url}

    @route("GET HEAD", rf"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
    def download(self, name: str, revision: str, path: str):
        repository = self.repository(name)
        revision = repository.head if revision == "main" else revision
        files = repository.files(revision)
        if path not in files:
            raise HubError(404, "EntryNotFound")
        if "Range" in self.headers:
            raise HubError(501, message="Parts of files are not implemented.")
        self.send(200, files[path].content, {"X-Repo-Commit": revision, "ETag": f'"{files[path].oid}"'})

    def repository(self, name: str, write: bool = False) -> Repository:
        """The repository, if there is one that the user may see, or write to."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.user != name.split("/")[0]):
            raise HubError(404 if self.user else 401, "RepoNotFound")
        if write:
            self.check_owner(name)
        return repository

    def check_owner(self, name: str) -> None:
        if self.user != name.split("/")[0]:
            raise HubError(403 if self.user else 401, message=f"No permission to write to {name}.")

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # A large file is read where it is stored.
        self.body = b"" if self.command == "PUT" else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = USERS.get(token)
        try:
            if token and self.user is None:
                raise HubError(401, message="Invalid credentials in Authorization header")
            for methods, pattern, function in ROUTES:
                match = pattern.fullmatch(unquote(url.path))
                if match and self.command in methods.split():
                    result = function(self, **match.groupdict())
                    if result is not None:
                        self.send(200, result)
                    return
            raise HubError(501, message=f"{self.command} {self.path} is not implemented.")
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self.send(error.status, {"error": str(error)}, {**headers, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Answers with bytes, or with anything else as JSON."""
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {**headers, "Content-Type": "application/json"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


class HubServer(ThreadingHTTPServer):
    """Serves in a thread of its own, as a context manager.

    Attributes:
        repositories: by name, such as `"user/model"`; those of `"user"` are writable with the token in `environment`.
        environment: of a process that uses this Hub; replace `HF_HOME` for a machine that has downloaded nothing yet.
        half_way: is called with the name of a repository in the middle of the upload of each large file; a
            `ConnectionError` that it raises cuts the connection.
    """

    daemon_threads = True

    def __init__(self, home: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.half_way: Callable[[str], None] = lambda name: None
        own = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(own)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_token_of_user",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that are gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
