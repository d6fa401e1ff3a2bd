"""A hub of data sets for tests: an HTTP server on this machine with the hub's paths, headers and error codes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "1234567890abcdef1234567890abcdef12345678"
TOKEN = "hf_secretOfThisTest"


@dataclass
class Fault:
    """An answer that the hub gives `times` times instead of what it has."""

    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class DatasetHub:
    """What the server has (`folder`/ORG/NAME/FILES), does wrong, and was asked for."""

    folder: Path
    gated: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=lambda: {"main", COMMIT})
    """All of them hold the same."""
    licences: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)
    bytes_sent: int = 0

    def write(self, name: str, content: bytes | str) -> None:
        """Put a file, ORG/NAME/FILE, on the hub."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def downloads(self) -> list[str]:
        """Contents that were asked for."""
        return [line for line in self.asked_for if line.startswith("GET") and "/resolve/" in line]


@contextmanager
def played_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[DatasetHub]:
    """A hub that the clients in this process ask instead of the real one, with an empty cache and a token set."""
    hub = DatasetHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_clients_at(f"http://127.0.0.1:{server.server_port}", monkeypatch, cache)
    yield hub
    server.shutdown()
    server.server_close()


def point_clients_at(address: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make the hub's clients in this process ask this address."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.hf_file_system import HfFileSystem

    HfFileSystem.clear_instance_cache()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(cache / "modules"))


class Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path.split("?")[0]).strip("/")
        self.hub.asked_for.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault.times and fault.path in path:
                fault.times -= 1
                return self.send(fault.status, headers=fault.headers)
        parts = path.removeprefix("api/").split("/")
        name, rest = "/".join(parts[1:3]), parts[3:]
        if parts[0] != "datasets" or not (self.hub.folder / name).is_dir():
            return self.refuse(404, "RepoNotFound")
        if "revision" not in rest[:1] and name in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if len(rest) > 1 and rest[1] not in self.hub.revisions:
            return self.refuse(404, "RevisionNotFound")
        if path.startswith("api/"):
            return self.tell(name, rest)
        self.give(self.hub.folder / name / "/".join(rest[2:]))

    def tell(self, name: str, rest: list[str]) -> None:
        """What the hub's API says of a data set."""
        folder = self.hub.folder / name
        if rest[:1] == ["tree"]:
            inside = [self.described(folder, path) for path in sorted((folder / "/".join(rest[2:])).rglob("*"))]
            return self.send(200, json.dumps(inside).encode()) if inside else self.refuse(404, "EntryNotFound")
        if rest[:1] == ["paths-info"]:
            paths = [folder / path for path in json.loads(self.body)["paths"]]
            return self.send(
                200, json.dumps([self.described(folder, path) for path in paths if path.exists()]).encode()
            )
        if rest[:1] not in ([], ["revision"]):
            return self.refuse(404, "EntryNotFound")
        files = [{"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()]
        card = {"license": self.hub.licences[name]} if name in self.hub.licences else {}
        self.send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": files, "cardData": card}).encode())

    def described(self, folder: Path, path: Path) -> dict[str, object]:
        kind = "file" if path.is_file() else "directory"
        oid = hashlib.sha1(str(path).encode()).hexdigest()
        return {"type": kind, "oid": oid, "size": path.stat().st_size, "path": str(path.relative_to(folder))}

    def give(self, path: Path) -> None:
        """The content of a file, or the part of it that is asked for."""
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        if asked is None:
            return self.send(200, content, headers)
        first, last = asked.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.send(206, part, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, headers={"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.hub.bytes_sent += len(content)

    def log_message(self, *arguments: object) -> None:
        pass
