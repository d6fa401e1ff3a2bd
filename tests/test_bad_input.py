"""Each mistake a user can make before training, and the one line it is answered with."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.config import PROJECT
from jobs.preflight import check_writable

pytestmark = pytest.mark.chain

TEST_YAML = str(PROJECT / "configs/test.yaml")


def train_sh(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PATH": path} if path else {})
    command = [str(PROJECT / "train.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def error_line(answer: subprocess.CompletedProcess[str]) -> str:
    """The one line that was printed; no traceback, and the exit code of a user's mistake."""
    assert answer.returncode == 64, answer.stdout + answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.stderr
    return lines[0]


def module(folder: Path, text: str) -> list[str]:
    file = folder / "mine.py"
    file.write_text(text)
    folders = ["--runs_dir", str(folder / "runs"), "--data_dir", str(folder / "data"), "--cluster", "local"]
    return ["--dataset.file", str(file), *folders]


def test_a_missing_file() -> None:
    assert "none.yaml: no such file" in error_line(train_sh("configs/none.yaml"))


def test_a_misspelt_command() -> None:
    assert "chek is no command and no file; did you mean check?" in error_line(train_sh("chek", "configs/test.yaml"))


def test_an_unknown_key_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(Path(TEST_YAML).read_text().replace("batch_size", "batchsize"))
    assert "unknown key training.batchsize; did you mean training.batch_size?" in error_line(
        train_sh("check", str(file))
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def get_data(config): return []\n", "get_custom_dataset"),
        ("def get_custom_dataset(config, processor, split)\n    return []\n", "mine.py:1"),
    ],
)
def test_a_module_that_cannot_be_right_is_told_without_running_it(tmp_path: Path, text: str, told: str) -> None:
    assert told in error_line(train_sh("check", TEST_YAML, *module(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def get_custom_dataset(config, processor, split): return []\n", "0 rows"),
        (
            "ROWS = [{'question': 'a', 'answer': 'b'}] * 9\n"
            "def get_custom_dataset(config, processor, split): return {'train': ROWS}[split]\n",
            "dataset.test_split",
        ),
        ("def get_custom_dataset(config, processor, split): return [{'colour': 'red'}] * 9\n", "colour"),
    ],
)
def test_a_module_that_returns_the_wrong_thing_stops_the_run_at_once(tmp_path: Path, text: str, told: str) -> None:
    answer = train_sh("prepare", TEST_YAML, *module(tmp_path, text))
    assert answer.returncode == 64
    assert "Traceback" not in answer.stderr
    assert told in answer.stderr
    assert not list((tmp_path / "data").rglob("PREPARED"))


def test_a_dataset_that_does_not_exist() -> None:
    assert "no dataset module nowhere.py" in error_line(train_sh("check", TEST_YAML, "--dataset.name", "nowhere"))


def test_a_key_that_the_dataset_module_does_not_read() -> None:
    assert "dataset.shuffel: nothing in" in error_line(train_sh("check", TEST_YAML, "--dataset.shuffel", "true"))


def test_data_files_that_do_not_exist() -> None:
    answer = train_sh("check", str(PROJECT / "configs/gsm8k.yaml"), "--dataset.data_files", "none.jsonl")
    assert "dataset.data_files: no file none.jsonl. Looked for:" in error_line(answer)


def test_a_model_folder_that_does_not_exist() -> None:
    assert "no folder ./nothing/here" in error_line(train_sh("check", TEST_YAML, "--model.name", "./nothing/here"))


def test_a_model_folder_without_a_config(tmp_path: Path) -> None:
    assert "has no config.json" in error_line(train_sh("check", TEST_YAML, "--model.name", str(tmp_path)))


def test_slurm_asked_for_where_there_is_none(tmp_path: Path) -> None:
    for tool in ("bash", "env", "readlink", "dirname", "python3", "flock", "cat", "ls", "mkdir", "git"):
        found = subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip()
        (tmp_path / tool).symlink_to(found)
    answer = train_sh("check", TEST_YAML, "--cluster", "slurm", path=str(tmp_path))
    assert "slurm needs a cluster, and there is no sbatch on the PATH" in error_line(answer)


def test_a_runs_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in error_line(train_sh("check", TEST_YAML, "--runs_dir", str(tmp_path / "file")))


def refused_as_nobody(folder: Path) -> None:
    os.setuid(65534)
    try:
        check_writable(folder / "runs")
    except ValueError as error:
        sys.exit(0 if f"no permission to write in {folder}" in str(error) else 2)
    sys.exit(1)


def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="no permission to write"):
            check_writable(tmp_path / "runs")
        return
    # Root may write anywhere, so the check runs as nobody.
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(0o755)
    child = multiprocessing.get_context("fork").Process(target=refused_as_nobody, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
