"""Files of hub data sets brought here as JSONL: with patience, resumed where it stopped, and with progress shown."""

from __future__ import annotations

import email.utils
import fnmatch
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import orjson
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mixture.hub import HubSource, ReadRows
from mixture.image_files import ImageFolder
from mixture.image_sources import ImageLines, file_holds_images, file_rows
from mixture.row_files import json_lines, kind_of, parquet_lines, row_line, write_lines

Result = TypeVar("Result")
Report = Callable[[str], None]

MARKER = "FETCHED.json"
FIRST_WAIT_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
"""How long a hub that does not answer is asked again; the hub's client waits inside many calls as well."""
LONGEST_WAIT_SECONDS = 600.0
"""The longest wait that a hub may ask for, on top of that."""
REPORT_EVERY_SECONDS = 30.0
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class HubUnavailableError(ConnectionError):
    """The hub did not give what it has, after all attempts: it is down, or too many ask it."""


@dataclass(frozen=True)
class HubFile:
    """A file of a hub data set."""

    path: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A split on this machine."""

    files: tuple[Path, ...]
    revision: str
    licence: str | None
    rows: int


def fetched(folder: Path) -> Fetched | None:
    """What an earlier run fetched into the folder, if it fetched all."""
    marker = folder / MARKER
    if not marker.is_file():
        return None
    record = orjson.loads(marker.read_bytes())
    files = tuple(folder / name for name in record["files"])
    return Fetched(files=files, revision=record["revision"], licence=record["licence"], rows=record["rows"])


def fetch_split(
    source: HubSource,
    split: str,
    folder: Path,
    task: FetchTask,
    *,
    read_rows: ReadRows | None = None,
    max_rows: int | None = None,
) -> Fetched:
    """One split of a pinned source as JSONL parts in `folder`, one part for each file on the hub, in their order.

    Parts that are there are not fetched again. No file is begun once the parts hold `max_rows` rows. The folder is
    complete when it holds the marker. HubUnavailableError: the hub is down or refuses for now. ValueError: it has no
    such data, or asks for terms to be accepted.
    """
    assert source.id is not None and source.revision is not None
    if (done := fetched(folder)) is not None:
        return done
    files = hub_files(source, split, task)
    task.begin(source.id, files)
    parts: list[Path] = []
    rows = 0
    for number, file in enumerate(files):
        if max_rows is not None and rows >= max_rows:
            break
        part = folder / f"part-{number:05d}.jsonl"
        if not part.exists():
            left = None if max_rows is None else max_rows - rows
            patiently(partial(write_part, source, file, part, task, read_rows, left), source, task)
        task.file_done(file)
        rows += count_lines(part)
        parts.append(part)
    if not rows:
        raise ValueError(f"{source.id} has no rows in split {split}")
    record = {
        "id": source.id,
        "revision": source.revision,
        "config": source.config,
        "licence": source.licence,
        "split": split,
        "rows": rows,
        "files": [part.name for part in parts],
        "hub_files": {file.path: file.bytes for file in files[: len(parts)]},
    }
    write_lines([orjson.dumps(record, option=orjson.OPT_INDENT_2)], folder / MARKER)
    return Fetched(files=tuple(parts), revision=source.revision, licence=source.licence, rows=rows)


def write_part(
    source: HubSource, file: HubFile, part: Path, task: FetchTask, read_rows: ReadRows | None, max_rows: int | None
) -> None:
    """Write the first `max_rows` rows of a hub file, as the dataset module reads them, and files of their images."""
    if source.columns and kind_of(file.path) == "parquet":
        lines: Iterable[bytes] = streamed_columns(source, file, task)
    else:
        path = downloaded(source, file, task)
        if file_holds_images(path):
            rows = itertools.islice(file_rows(path) if read_rows is None else read_rows(file_rows(path)), max_rows)
            images = ImageFolder(part.parent.parent)
            write_lines(ImageLines(images=images, place=f"{source.id}, {file.path}").lines(rows, part), part)
            return
        lines = json_lines(path, source.columns)
    if read_rows is not None:
        lines = map(row_line, read_rows(orjson.loads(line) for line in lines))
    write_lines(itertools.islice(lines, max_rows), part)


def hub_files(source: HubSource, split: str, task: FetchTask) -> list[HubFile]:
    """The files of a split, in order; ValueError where there are none."""
    name = source.split_on_hub(split)
    list_files = listed_files if source.files and name in source.files else chosen_files
    files = patiently(lambda: list_files(source, name), source, task)
    if not files:
        raise ValueError(f"{source.id} at {source.revision} has no files for split {split}: {source.files or 'any'}")
    unknown = [file.path for file in files if kind_of(file.path) is None]
    if unknown:
        raise ValueError(f"{source.id}: files of unknown kind for split {split}: {', '.join(unknown[:3])}")
    return files


def listed_files(source: HubSource, split: str) -> list[HubFile]:
    """The files that the source's own patterns mean, pattern after pattern."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    assert source.id is not None and source.files is not None
    chosen = source.files[split]
    patterns = [chosen] if isinstance(chosen, str) else chosen
    folder = common_folder(patterns)
    tree = HfApi().list_repo_tree(
        source.id, folder or None, recursive=True, revision=source.revision, repo_type="dataset"
    )
    found = sorted((item for item in tree if isinstance(item, RepoFile)), key=lambda item: item.path)
    return [
        HubFile(item.path, item.size)
        for pattern in patterns
        for item in found
        if fnmatch.fnmatchcase(item.path, pattern)
    ]


def common_folder(patterns: list[str]) -> str:
    """The deepest folder that all patterns are below, "" for the top."""
    parents = [re.split(r"[*?\[]", pattern, maxsplit=1)[0].split("/")[:-1] for pattern in patterns]
    levels = zip(*parents, strict=False)
    return "/".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))


def chosen_files(source: HubSource, split: str) -> list[HubFile]:
    """The files that Hugging Face `datasets` reads for the split."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    builder = load_dataset_builder(str(source.id), source.config, revision=source.revision)
    present = builder.config.data_files or {}
    if split not in present:
        raise ValueError(f"{source.id} on the hub has no split {split!r}, only {', '.join(map(str, present))}")
    head = f"hf://datasets/{source.id}@{source.revision}/"
    paths = [str(path) for path in present[split]]
    system = HfFileSystem()
    return [HubFile(path.removeprefix(head), system.info(path)["size"]) for path in paths]


def downloaded(source: HubSource, file: HubFile, task: FetchTask) -> Path:
    """A hub file, fetched whole into Hugging Face's cache."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        str(source.id), file.path, repo_type="dataset", revision=source.revision, tqdm_class=task.byte_counter()
    )
    return Path(path)


def streamed_columns(source: HubSource, file: HubFile, task: FetchTask) -> Iterator[bytes]:
    """The wanted columns of a Parquet file, read from the hub as they are needed."""
    from huggingface_hub import HfFileSystem

    path = f"datasets/{source.id}@{source.revision}/{file.path}"
    with HfFileSystem().open(path, "rb", cache_type="none") as stream:  # no reading ahead, into other columns
        yield from parquet_lines(stream, source.columns)


def count_lines(path: Path) -> int:
    """Lines of a file that ends in a line break."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def fetched_bytes(address: str) -> bytes | None:
    """What is at a web address, asked for again while the server is busy; None where there is nothing."""
    from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined, unused-ignore]

    try:
        response = http_backoff("GET", address)
    except Exception as error:
        raise HubUnavailableError(f"{address}: {why(error)}") from None
    if response.status_code in (403, 404):
        return None
    if response.status_code != 200:
        raise HubUnavailableError(f"{address}: answers {response.status_code}")
    return bytes(response.content)


# --- patience


def patiently(call: Callable[[], Result], source: HubSource, task: FetchTask) -> Result:
    """What the call returns; it is made again while the hub is busy or away, after waits that the hub may ask for.

    HubUnavailableError: it stayed away. ValueError: trying again would not help, and what would.
    """
    began = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise explained(error, source) from None
            reason, waited = why(error), time.monotonic() - began
            wait = wait_seconds(error, attempt)
            if waited > PATIENCE_SECONDS or (waited + wait > PATIENCE_SECONDS and not asked_wait(error)):
                raise HubUnavailableError(f"{source.id}: {reason}, for {waited:.0f} s; try again later") from None
            task.say(f"{reason}; trying again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status in RETRIED_STATUSES
    return is_network_error(error) and not is_offline()


def is_network_error(error: Exception) -> bool:
    """Whether no answer came at all."""
    return bool(kinds(error) & {"ConnectionError", "TimeoutError", "TransportError", "LocalEntryNotFoundError"})


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def kinds(error: BaseException) -> set[str]:
    """Names of the classes of an error and of what caused it; those of the hub's HTTP client have moved before."""
    own = {kind.__name__ for kind in type(error).__mro__}
    return own | kinds(error.__cause__) if error.__cause__ is not None else own


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the hub's client, or its cause, stands for."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and error.__cause__ is not None:
        return status_of(error.__cause__)
    return status if isinstance(status, int) else None


def wait_seconds(error: Exception, attempt: int) -> float:
    """What the hub asks for, else twice as long each time."""
    asked = asked_wait(error)
    return FIRST_WAIT_SECONDS * 2 ** (attempt - 1) if asked is None else asked


def asked_wait(error: BaseException) -> float | None:
    """Seconds that `Retry-After` asks for, in seconds or as a date, within bounds."""
    cause = error if getattr(error, "response", None) is not None else error.__cause__
    asked = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After")
    if asked is None:
        return None
    seconds = float(asked) if asked.isdigit() else email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    return min(max(seconds, 0.0), LONGEST_WAIT_SECONDS)


def why(error: Exception) -> str:
    """A failure in a few words that hold no request, no address and so no token."""
    status = status_of(error)
    return f"the hub does not answer ({type(error).__name__})" if status is None else f"the hub answers {status}"


def explained(error: Exception, source: HubSource) -> Exception:
    """The error in the user's terms; what is no error of the hub comes back as it is."""
    names = kinds(error)
    place = f"{source.id} at {source.revision or 'its newest revision'}"
    has_token = "the token that is set has no access" if is_token_set() else "no token is set"
    if is_offline() and is_network_error(error):
        return ValueError(f"{place} is not here, and HF_HUB_OFFLINE is set: fetch it where there is a network")
    if "GatedRepoError" in names:
        return ValueError(
            f"{source.id} is gated ({has_token}): accept its terms at https://huggingface.co/datasets/{source.id}, "
            "then set HF_TOKEN or run `hf auth login`"
        )
    if "RevisionNotFoundError" in names:
        return ValueError(f"{source.id} has no revision {source.revision} on the hub")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status_of(error) in (401, 403):
        return ValueError(
            f"{source.id}: the hub has no data set of that id, or it is private or gated ({has_token}); "
            "if so, ask for access and set HF_TOKEN or run `hf auth login`"
        )
    if "EntryNotFoundError" in names:
        return ValueError(f"{place}: the hub has no such file or folder: {source.files or 'any'}")
    if "HfHubHTTPError" in names:
        return ValueError(f"{place}: {why(error)}")
    return error


def is_token_set() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def pinned(source: HubSource, task: FetchTask) -> HubSource:
    """The source at the commit that its branch has now, with the licence that the hub states where none is known."""
    if source.licence and source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision):
        return source
    from huggingface_hub import HfApi

    info = patiently(lambda: HfApi().dataset_info(str(source.id), revision=source.revision), source, task)
    stated = getattr(info.card_data, "license", None) if info.card_data else None
    licence = source.licence or (", ".join(stated) if isinstance(stated, list) else stated)
    return replace(source, revision=info.sha, licence=licence)


# --- progress


class FetchDisplay:
    """One progress bar a source on a terminal, else lines now and then."""

    def __init__(self, report: Report, console: Console | None = None) -> None:
        self.report = report
        self.console = console or Console(stderr=True)
        self.progress: Progress | None = None

    def __enter__(self) -> FetchDisplay:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined, unused-ignore]

        disable_progress_bars()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console)
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def task(self, name: str) -> FetchTask:
        """Progress of one source; nothing is shown before it begins to fetch."""
        return FetchTask(self, name)


class FetchTask:
    """Progress of one source, told by the thread that fetches it and by those of the hub's client."""

    def __init__(self, display: FetchDisplay, name: str) -> None:
        self.display = display
        self.name = name
        self.lock = threading.Lock()
        self.total = self.finished = self.current = 0
        self.told = time.monotonic()
        self.bar: Any = None

    def begin(self, place: str, files: list[HubFile]) -> None:
        """The files to fetch are known."""
        self.total = sum(file.bytes for file in files)
        self.say(f"fetching {len(files)} files, {self.total / 1e6:.1f} MB, of {place}")
        if self.display.progress is not None:
            self.bar = self.display.progress.add_task(self.name, total=self.total)

    def advance(self, count: float) -> None:
        """So many bytes of the current file arrived."""
        with self.lock:
            self.current += int(count)
            self.show()

    def file_done(self, file: HubFile) -> None:
        """A file is here, whatever was counted of it."""
        with self.lock:
            self.finished, self.current = self.finished + file.bytes, 0
            self.show()

    def show(self) -> None:
        here = self.finished + self.current
        if self.display.progress is not None and self.bar is not None:
            self.display.progress.update(self.bar, completed=min(here, self.total))
        elif time.monotonic() - self.told > REPORT_EVERY_SECONDS:
            self.told = time.monotonic()
            self.say(f"{min(here / max(self.total, 1), 1):.0%} of {self.total / 1e6:.1f} MB")

    def say(self, text: str) -> None:
        """A line about this source."""
        self.display.report(f"{self.name}: {text}")

    def byte_counter(self) -> type[Any]:
        """A silent progress bar class for the hub's client, which tells this task the bytes that arrive."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        task = self

        class ByteCounter(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})

            def update(self, count: float | None = 1) -> None:
                task.advance(count or 0)

        return ByteCounter
