"""Models from a hub: an HTTP server on this machine plays it, with its paths, headers and error codes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.config import PROJECT

pytestmark = pytest.mark.chain

TEST_YAML = str(PROJECT / "configs/test.yaml")
COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(BaseHTTPRequestHandler):
    """Serves one public model, `org/tiny`, and one gated one, `org/gated`."""

    folder: Path
    asked_for: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        self.asked_for.append(self.path)
        if self.path.startswith("/api/models/org/tiny/tree"):
            return self.refuse(404, "EntryNotFound")  # the model has none of the folders that are asked for
        model = "/".join(parts[:2])
        if model not in ("org/tiny", "org/gated") or len(parts) != 5:
            return self.refuse(404, "RepoNotFound")
        if model == "org/gated":
            return self.refuse(403, "GatedRepo")
        revision, file = parts[3], self.folder / parts[4]
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub that has the tiny model, with weights."""
    folder = tmp_path_factory.mktemp("hub")
    tiny = PROJECT / "configs/models/tiny"
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny)).save_pretrained(folder)
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked_for": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def train_sh(hub: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_of_this_test",
        "HF_HUB_OFFLINE": "0",
    }
    command = [str(PROJECT / "train.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.name", "org/missing"], "the hub has no model of that id"),
        (["--model.name", "org/gated"], "org/gated is gated: accept its terms on the hub and set HF_TOKEN"),
        (["--model.name", "org/tiny", "--model.revision", "v9"], "org/tiny has no revision v9 on the hub"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_told_at_once(
    hub: str, tmp_path: Path, arguments: list[str], told: str
) -> None:
    answer = train_sh(hub, tmp_path, "check", TEST_YAML, *arguments)
    assert answer.returncode == 64
    assert told in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_a_hub_that_does_not_answer_is_told_in_a_second(tmp_path: Path) -> None:
    answer = train_sh("http://127.0.0.1:9", tmp_path, "check", TEST_YAML, "--model.name", "org/tiny")
    assert answer.returncode == 64
    assert "the hub does not answer" in answer.stderr


def test_adapters_are_trained_on_a_model_of_the_hub_and_no_token_is_written_down(hub: str, tmp_path: Path) -> None:
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    model = ["--model.name", "org/tiny", "--model.from_scratch", "false", "--model.peft", "true"]
    short = ["--training.total_jobs", "1", "--training.epochs_per_job", "1", "--evaluation.limit", "0"]
    answer = train_sh(hub, tmp_path / "cache", TEST_YAML, *folders, *model, *short, "--model.merge_adapter", "true")
    logs = "\n".join(path.read_text() for path in (tmp_path / "runs/test/logs").glob("*"))
    assert answer.returncode == 0, answer.stdout + answer.stderr + logs
    run = tmp_path / "runs/test"
    assert (run / "export/adapter_model.safetensors").exists()
    assert (run / "export/merged/model.safetensors").exists()
    for path in run.rglob("*"):
        if path.is_file() and "code" not in path.parts:
            assert b"hf_of_this_test" not in path.read_bytes(), path
