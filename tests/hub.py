"""A Hub on the loopback interface, in memory: what the real huggingface_hub client needs to push and to pull.

    hub = Hub()                       # listens at hub.url, the value for HF_ENDPOINT
    hub.repos["model", "user/name"]   # what was pushed
    hub.requests                      # what was asked
    hub.cut_downloads = 1000          # from now on, connections drop after this many bytes
    hub.stop()

Left out is what no test needs: pull requests, pagination, deletion of repositories, Xet storage.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "user"
WRITE_TOKEN = "hf_writes"
READ_TOKEN = "hf_reads"
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".parquet")  # stored as large files whatever their size

# ---------------------------------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file of a commit; git knows a large one by a short pointer to its SHA-256."""

    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """This file in a listing."""
        entry = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.content)}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: "Commit | None"
    files: dict[str, File]


@dataclass
class Repo:
    """Branches and tags are names of commits; a new repository has one empty commit on main."""

    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {})

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {title}".encode()).hexdigest()
        self.branches[branch] = self.commits[oid] = Commit(oid, title, self.branches.get(branch), files)
        return self.branches[branch]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an oid."""
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first, without the empty one that every repository begins with."""
        commits, commit = [], self.branches[branch]
        while commit.parent is not None:
            commits.append(commit)
            commit = commit.parent
        return commits


# ---------------------------------------------------------------------------------------------------------------------
# Requests and answers
# ---------------------------------------------------------------------------------------------------------------------


class HubError(Exception):
    """An answer that is an error; the client tells errors apart by the code in a header."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class CutError(Exception):
    """The connection is closed without an answer."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Any
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """A JSON value, or bytes to be sent whole or, if the request has a range, in part."""

    value: Any = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Answer the requests whose path matches; what is in {braces} becomes an argument of the same name."""
    parts = {
        "{kind}": r"(?P<kind>model|dataset)s",
        "{prefix}": r"(?:(?P<kind>dataset)s/)?",
        "{name}": r"(?P<name>[\w.-]+/[\w.-]+)",
        "{revision}": r"(?P<revision>[^/]+)",
        "{sha256}": r"(?P<sha256>[0-9a-f]{64})",
        "{path}": r"(?P<path>.*)",
    }
    for placeholder, expression in parts.items():
        pattern = pattern.replace(placeholder, expression)

    def register(answer: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), answer))
        return answer

    return register


class Hub:
    """The server, its repositories and the switches that break it.

    repos: by ("model" or "dataset", "user/name").
    requests: "METHOD /path" of every request, oldest first.
    cut_uploads, cut_downloads: if not None, a large upload or a download is cut off after this many bytes.
    """

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Connection)
        self.server.daemon_threads = True
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.lock = threading.Lock()
        self.reset()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_uploads: int | None = None
        self.cut_downloads: int | None = None

    def stop(self) -> None:
        """Close the port: connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def answer(self, request: Request) -> Answer:
        """Find the route, check the token, and let one request at a time read or change the repositories."""
        with self.lock:
            self.requests.append(f"{request.method} {request.path}")
            if request.token not in (None, READ_TOKEN, WRITE_TOKEN):
                raise HubError(401, "", "Invalid credentials in Authorization header")
            method = "GET" if request.method == "HEAD" else request.method
            for route_method, pattern, answer in ROUTES:
                if method == route_method and (match := pattern.fullmatch(urlsplit(request.path).path)):
                    arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    return answer(self, request, **arguments)
            raise HubError(501, "", f"this Hub does not know {request.method} {request.path}")

    def readable(self, request: Request, kind: str | None, name: str) -> Repo:
        """The repository, for someone who may see it; to others, a private one looks like none."""
        repo = self.repos.get((kind or "model", name))
        if repo is None or (repo.private and request.token is None):
            raise HubError(401 if request.token is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, request: Request, kind: str | None, name: str) -> Repo:
        require_right_to_write(request)
        return self.readable(request, kind, name)

    # --- the account

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        if request.token is None:
            raise HubError(401, "", "Invalid username or password.")
        return Answer({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request: Request) -> Answer:
        return Answer({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        require_right_to_write(request)
        kind, name = (
            request.json.get("type", "model"),
            f"{request.json.get('organization') or USER}/{request.json['name']}",
        )
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.repos:
            return Answer({"error": "You already created this repo", "url": url}, status=409)
        self.repos[kind, name] = Repo(private=request.json.get("visibility") == "private")
        return Answer({"url": url, "name": name, "id": name})

    # --- a repository

    @route("GET", "/api/{kind}/{name}")
    def repo_info(self, request: Request, kind: str, name: str) -> Answer:
        return self.revision_info(request, kind, name, "main")

    @route("GET", "/api/{kind}/{name}/revision/{revision}")
    def revision_info(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self.readable(request, kind, name)
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Answer({"id": name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings})

    @route("GET", "/api/{kind}/{name}/refs")
    def refs(self, request: Request, kind: str, name: str) -> Answer:
        repo = self.readable(request, kind, name)

        def listed(names: dict[str, Commit], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.oid} for n, c in names.items()]

        return Answer({"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})

    @route("POST", "/api/{kind}/{name}/branch/{revision}")
    def create_branch(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self.writable(request, kind, name)
        if revision in repo.branches:
            raise HubError(409, "", "Reference already exists")
        repo.branches[revision] = repo.at(request.json.get("startingPoint", "main"))
        return Answer({}, status=201)

    @route("POST", "/api/{kind}/{name}/tag/{revision}")
    def create_tag(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self.writable(request, kind, name)
        repo.tags[request.json["tag"]] = repo.at(revision)
        return Answer({}, status=201)

    @route("GET", "/api/{kind}/{name}/tree/{revision}(?:/{path})?")
    def tree(self, request: Request, kind: str, name: str, revision: str, path: str | None) -> Answer:
        files = self.readable(request, kind, name).at(revision).files
        folder = f"{path}/" if path else ""
        below = {p.removeprefix(folder): file for p, file in sorted(files.items()) if p.startswith(folder)}
        if path and not below:
            raise HubError(404, "EntryNotFound", "Entry not found")
        if "recursive=true" in request.path.lower():
            return Answer([file.entry(folder + p) for p, file in below.items()])
        folders = sorted({p.split("/")[0] for p in below if "/" in p})
        entries = [{"type": "directory", "path": folder + p, "oid": "0" * 40, "size": 0} for p in folders]
        return Answer([*entries, *(file.entry(folder + p) for p, file in below.items() if "/" not in p)])

    @route("POST", "/api/{kind}/{name}/paths-info/{revision}")
    def paths_info(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        files = self.readable(request, kind, name).at(revision).files
        is_form = "form" in request.headers.get("Content-Type", "")
        paths = parse_qs(request.body.decode())["paths"] if is_form else request.json["paths"]
        return Answer([files[path].entry(path) for path in paths if path in files])

    # --- pull

    @route("GET", "/{prefix}{name}/(?:resolve|raw)/{revision}/{path}")
    def download(self, request: Request, kind: str | None, name: str, revision: str, path: str) -> Answer:
        commit = self.readable(request, kind, name).at(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        return Answer(content=file.content, headers=headers)

    # --- push: which files are large, upload those, commit everything

    @route("POST", "/api/{kind}/{name}/preupload/{revision}")
    def preupload(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        present = self.writable(request, kind, name).at(revision).files

        def decide(path: str) -> dict[str, Any]:
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = {"oid": present[path].git_oid} if path in present else {}
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, **oid}

        return Answer({"files": [decide(file["path"]) for file in request.json["files"]]})

    @route("POST", r"/{prefix}{name}\.git/info/lfs/objects/batch")
    def large_file_batch(self, request: Request, kind: str | None, name: str) -> Answer:
        self.writable(request, kind, name)

        def decide(oid: str, size: int) -> dict[str, Any]:
            upload = {"actions": {"upload": {"href": f"{self.url}/large/{oid}"}}}
            return {"oid": oid, "size": size, **({} if oid in self.large_files else upload)}

        objects = [decide(entry["oid"], entry["size"]) for entry in request.json["objects"]]
        return Answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/large/{sha256}")
    def upload_large_file(self, request: Request, sha256: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "", "the content does not have this SHA-256")
        self.large_files[sha256] = request.body
        return Answer()

    @route("POST", "/api/{kind}/{name}/commit/{revision}")
    def commit(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repo = self.writable(request, kind, name)
        if revision not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        parent = repo.branches[revision]
        files, title = dict(parent.files), ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent.oid) != parent.oid:
                    raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise HubError(400, "", "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = File(self.large_files[value["oid"]], is_large=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(501, "", f"this Hub does not know the operation {key}")
        new = repo.commit(revision, title, files)
        return Answer({"success": True, "commitOid": new.oid, "commitUrl": f"{self.url}/{name}/commit/{new.oid}"})


def require_right_to_write(request: Request) -> None:
    if request.token is None:
        raise HubError(401, "", "Invalid username or password.")
    if request.token != WRITE_TOKEN:
        raise HubError(403, "", "You don't have the rights to create or change this repository")


class Connection(BaseHTTPRequestHandler):
    """HTTP around `Hub.answer`: one object a connection, one `handle_request` a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def handle_request(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        try:
            answer = hub.answer(Request(self.command, self.path, self.headers, self.read_body(hub.cut_uploads)))
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            answer = Answer({"error": error.message}, headers=headers, status=error.status)
        except CutError:
            self.close_connection = True
            return
        self.send(answer, hub.cut_downloads)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815  names that http.server calls

    def read_body(self, cut_uploads: int | None) -> bytes:
        if self.command == "PUT" and cut_uploads is not None:
            self.rfile.read(cut_uploads)
            raise CutError
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, answer: Answer, cut_downloads: int | None) -> None:
        body = json.dumps(answer.value).encode() if answer.content is None else answer.content
        status, headers = answer.status, dict(answer.headers)
        if answer.content is not None and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(match[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        self.send_response(status)
        headers["Content-Type"] = "application/json" if answer.content is None else "application/octet-stream"
        headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.content is not None and cut_downloads is not None and len(body) > cut_downloads:
            body, self.close_connection = body[:cut_downloads], True
        self.wfile.write(body)
