"""Every source of a mixture as JSONL files on this machine, with where its rows come from on record."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
import xxhash
from rich.console import Console

from mixture.config import DatasetConfig
from mixture.dataset_modules import COLLATOR_FUNCTION, ModuleFile, load_module, load_rows, resolve_module
from mixture.fetch import FetchDisplay, FetchTask, HubUnavailableError, fetch_split, fetched, hub_files, pinned
from mixture.hub import HubRows, HubSource, ReadRows
from mixture.image_files import ImageFolder
from mixture.image_rows import without_decoding
from mixture.image_sources import NOTE, ImageLines, file_holds_images, file_rows, has_image, rows_with_first
from mixture.row_files import ENDINGS, is_plain_jsonl, json_lines, kind_of, row_line, write_lines

FORMAT_VERSION = 1
"""Part of every key: raised when the same input would give other JSONL."""
SIDE_BY_SIDE = 8
SAMPLED_BYTES = 1 << 20
HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
HUB_PATH = re.compile(r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?/(?P<file>.+)")
NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
ATTRIBUTION_HEAD = """# Where this data comes from

One section a source. Keep this file with the data, and with what is made of it where a licence asks for attribution.
"""


class WantedPlace(Protocol):
    """What says where rows are: a source of a recipe (mixture.recipe.SourceConfig), or one of its fallbacks."""

    @property
    def path(self) -> str | list[str] | None:
        """Files, folders, globs or hf:// paths."""

    @property
    def hub(self) -> str | None:
        """ORG/NAME[:CONFIG][@REVISION] of a hub data set."""

    @property
    def file(self) -> str | list[str] | None:
        """Files inside the hub data set, as patterns; or, without `hub` and `path`, a dataset module's path."""

    @property
    def split(self) -> str | None: ...
    @property
    def options(self) -> Mapping[str, Any]:
        """Keys for the dataset module."""

    @property
    def licence(self) -> str | None: ...


class WantedSource(WantedPlace, Protocol):
    """A source of a recipe: without path and hub it is the dataset module of its name."""

    @property
    def name(self) -> str: ...
    @property
    def fallback(self) -> Sequence[WantedPlace]: ...


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of a source come from; what a lock file holds."""

    name: str
    place: str
    """Hub id with its configuration, the files, or the dataset module."""
    revision: str | None
    """Full commit hash on the hub; of files and modules, a hash of what they hold."""
    split: str
    choice: int = 0
    """0: the primary place, n: the nth fallback."""
    licence: str | None = None
    commercial_use: bool | None = None
    """None: not known."""
    max_rows: int | None = None
    rows: int | None = None
    """Rows fetched; None where files are used in place and nobody counted."""


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """A source that can be scanned."""

    origin: Origin
    files: tuple[Path, ...]
    """JSONL, uncompressed, in the order in which they are to be read; never to be written to."""
    images: ImageFolder | None = None
    """Where the images lie that rows name; None: they name none."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place that a source may be read from: exactly one of hub, files and module is set."""

    name: str
    split: str
    choice: int
    licence: str | None
    commercial_use: bool | None
    hub: HubSource | None = None
    read_rows: ReadRows | None = None
    code: str = ""
    """Hash of the module that reads the rows, if one does."""
    files: tuple[Path, ...] = ()
    module: ModuleFile | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys for the module."""
    frozen_revision: str | None = None
    """What a lock file wants of a hub data set that the recipe does not pin."""

    def origin(self, place: str, revision: str | None, **more: Any) -> Origin:
        """The record of this place."""
        own = {key: getattr(self, key) for key in ("name", "split", "choice", "licence", "commercial_use")}
        return Origin(place=place, revision=revision, **{**own, **more})


def open_sources(
    sources: Sequence[WantedSource],
    *,
    data_dir: Path,
    folders: Sequence[Path],
    project: Path,
    split: str = "train",
    max_rows: Mapping[str, int] | None = None,
    allow_non_commercial: bool = False,
    frozen: Mapping[str, Origin] | None = None,
    report: Callable[[str], None] = print,
    console: Console | None = None,
) -> list[OpenedSource]:
    """The sources in their order; what is not JSONL on this machine is brought to `data_dir`/sources, side by side.

    `folders` are tried for relative paths, the recipe's own first. `max_rows` limits what is fetched from the hub for
    a source, by its name; `split` is read where a source names none. A place that cannot be had gives way to the next
    fallback; with `frozen`, from a lock file, only what was used then will do.

    Raises:
        ValueError: a missing file, module, split or permission; a licence that forbids commercial use; not as frozen.
        HubUnavailableError: the hub is down, or refuses for now.
    """
    places = [wanted_places(source, split, folders, project) for source in sources]
    if frozen is not None:
        places = [as_frozen(chain, frozen) for chain in places]
    refuse_non_commercial([chain[0] for chain in places], allow=allow_non_commercial)
    with FetchDisplay(report, console) as display, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        opening = [
            pool.submit(
                open_first,
                chain,
                display.task(chain[0].name),
                data_dir=data_dir,
                max_rows=(max_rows or {}).get(chain[0].name),
                frozen=None if frozen is None else frozen[chain[0].name],
                allow_non_commercial=allow_non_commercial,
            )
            for chain in places
        ]
        try:
            return [future.result() for future in opening]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def download_sizes(
    sources: Sequence[WantedSource],
    *,
    data_dir: Path,
    folders: Sequence[Path],
    project: Path,
    split: str = "train",
    max_rows: Mapping[str, int] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, int]:
    """Bytes that `open_sources` would fetch for each source, 0 where all is here; asks the hub, fetches nothing."""
    sizes: dict[str, int] = {}
    with FetchDisplay(report) as display:
        for source in sources:
            chain = wanted_places(source, split, folders, project)
            here = already_fetched(chain, data_dir, (max_rows or {}).get(source.name))
            sizes[source.name] = 0 if here else first_size(chain, display.task(source.name))
    return sizes


def first_size(chain: Sequence[Place], task: FetchTask) -> int:
    """Bytes on the hub of the first place that can be had."""
    for place in chain:
        if place.hub is None:
            return 0
        try:
            return sum(file.bytes for file in hub_files(pinned(place.hub, task), place.split, task))
        except (ValueError, HubUnavailableError):
            if place is chain[-1]:
                raise
    raise AssertionError


# --- which places there are


def wanted_places(source: WantedSource, split: str, folders: Sequence[Path], project: Path) -> list[Place]:
    """The places of a source, in the order to try them; ValueError: a path, glob or module that is not there."""
    wanted: list[WantedPlace] = [source, *source.fallback]
    places: list[Place] = []
    for place in wanted:
        found = places_of(source.name, place, place.split or source.split or split, folders, project)
        places += [replace(one, choice=len(places) + number) for number, one in enumerate(found)]
    return places


def places_of(name: str, wanted: WantedPlace, split: str, folders: Sequence[Path], project: Path) -> list[Place]:
    """What one entry of a recipe means: files, a hub data set, or a dataset module, which may have fallbacks itself."""
    stated = forbids_or_none(wanted.licence)
    common: dict[str, Any] = {"name": name, "split": split, "choice": 0}
    licence: dict[str, Any] = {"licence": wanted.licence, "commercial_use": stated}
    if wanted.options and (wanted.path is not None or wanted.hub is not None):
        raise ValueError(f"{name}: options are for dataset modules; path and hub take none, got {dict(wanted.options)}")
    if wanted.path is not None:
        paths = [wanted.path] if isinstance(wanted.path, str) else wanted.path
        if any(path.startswith("hf://") for path in paths):
            return [Place(**common, **licence, hub=hub_of_paths(name, paths, split, wanted.licence))]
        return [Place(**common, **licence, files=tuple(found_files(name, paths, folders)))]
    if wanted.hub is not None:
        return [Place(**common, **licence, hub=hub_of_text(name, wanted.hub, wanted.file, split, wanted.licence))]
    return module_places(name, wanted, common, folders, project)


def hub_of_text(name: str, text: str, file: str | list[str] | None, split: str, licence: str | None) -> HubSource:
    """The hub data set that `hub` and `file` mean."""
    match = HUB.fullmatch(text)
    if match is None:
        raise ValueError(f"{name}: hub {text!r} is not of the form ORG/NAME[:CONFIG][@REVISION]")
    return HubSource(
        id=match["id"],
        config=match["config"],
        revision=match["revision"],
        licence=licence,
        commercial_use=forbids_or_none(licence),
        format="auto",
        files=None if file is None else {split: file},
    )


def hub_of_paths(name: str, paths: Sequence[str], split: str, licence: str | None) -> HubSource:
    """The hub data set that hf:// paths lead into."""
    matches = [HUB_PATH.fullmatch(path) for path in paths]
    found = [match.groupdict() for match in matches if match is not None]
    if len(found) < len(paths) or len({(place["id"], place["revision"]) for place in found}) > 1:
        raise ValueError(
            f"{name}: hf:// paths have the form hf://datasets/ORG/NAME[@REVISION]/FILES, all of one data set in one "
            f"source; got {', '.join(paths)}"
        )
    text = found[0]["id"] + (f"@{found[0]['revision']}" if found[0]["revision"] else "")
    return hub_of_text(name, text, [place["file"] for place in found], split, licence)


def module_places(
    name: str, wanted: WantedPlace, common: dict[str, Any], folders: Sequence[Path], project: Path
) -> list[Place]:
    """The places of a dataset module: what its HubRows names, or the module itself."""
    if isinstance(wanted.file, list):
        raise ValueError(f"{name}: file is a list; without hub it names one dataset module, PATH.py")
    config = DatasetConfig(name=None if wanted.file else name, file=wanted.file)
    try:
        module = resolve_module(config, config_folder=folders[0], project=project)
    except ValueError as error:
        reason = str(error) if wanted.file else f"no path, hub or file is given, and {error}"
        raise ValueError(f"{name}: {reason}") from None
    function = getattr(load_module(module.path), module.function, None)
    source = function.source if isinstance(function, HubRows) else getattr(load_module(module.path), "SOURCE", None)
    stated = source if isinstance(source, HubSource) else None
    common = {**common, "code": content_hash([module.path])}
    if not isinstance(function, HubRows):
        licence = wanted.licence or (stated.licence if stated else None)
        use = stated.commercial_use if stated else forbids_or_none(licence)
        return [Place(**common, licence=licence, commercial_use=use, module=module, options=wanted.options)]
    unknown = set(wanted.options) - set(function.source.options)
    if unknown:
        known = ", ".join(function.source.options) or "none"
        raise ValueError(f"{name}: {module.path.stem} has no option {', '.join(sorted(unknown))}; known: {known}")
    return [
        Place(**common, licence=hub.licence, commercial_use=hub.commercial_use, hub=hub, read_rows=function.read_rows)
        for hub in function.source.candidates(wanted.options)
    ]


def found_files(name: str, paths: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """The files that paths, folders and globs mean, in a fixed order; ValueError names what is not there."""
    files: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        tried = [path] if path.is_absolute() else [folder / path for folder in folders]
        found = next((hits for place in tried if (hits := files_at(place))), None)
        if found is None:
            looked = "\n".join(f"  {place}" for place in tried)
            raise ValueError(f"{name}: no file with rows at {text}; known endings: {ENDINGS}. Looked for:\n{looked}")
        files += [file.resolve() for file in found]
    twice = {file for file in files if files.count(file) > 1}
    if twice:
        raise ValueError(f"{name}: path names {', '.join(map(str, sorted(twice)))} more than once")
    return files


def files_at(place: Path) -> list[Path]:
    """A file itself, whatever it is called; of a folder or glob the files of known kinds, sorted."""
    if place.is_file():
        return [place]
    if place.is_dir():
        inside = (path for path in place.rglob("*") if not any(part.startswith(".") for part in path.parts))
        found = sorted(path for path in inside if path.is_file() and kind_of(path) is not None)
        check_no_twins(found)
        return found
    place = place.absolute()
    hits = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
    return sorted(path for path in hits if path.is_file())


def check_no_twins(files: Sequence[Path]) -> None:
    """ValueError where a folder holds the same name with two endings: likely the same rows in two forms."""
    stems: dict[Path, Path] = {}
    for file in files:
        stem = file.with_name(file.name.partition(".")[0])
        other = stems.setdefault(stem, file)
        if other is not file:
            raise ValueError(f"{file.parent} holds {other.name} and {file.name}, maybe the same rows twice: name one")


# --- licences


def forbids_or_none(licence: str | None) -> bool | None:
    """False where the licence's name forbids commercial use, None where the name does not say."""
    return False if licence and NON_COMMERCIAL.search(licence) else None


def refuse_non_commercial(places: Sequence[Place], *, allow: bool) -> None:
    """ValueError names every source whose licence forbids commercial use, unless that is allowed."""
    refused = [f"  {place.name}: {place.licence}" for place in places if place.commercial_use is False]
    if refused and not allow:
        listed = "\n".join(refused)
        raise ValueError(
            "these sources do not allow commercial use; leave them out, or set allow_non_commercial: true if yours is "
            f"none:\n{listed}"
        )


def write_attribution(path: Path, origins: Sequence[Origin]) -> None:
    """A Markdown file that names each source, its place, revision and licence, and what its licence asks for."""
    sections = [ATTRIBUTION_HEAD]
    for origin in sorted(origins, key=lambda one: one.name):
        use = {True: "allowed", False: "not allowed", None: "not known"}[origin.commercial_use]
        licence = origin.licence or "none stated: ask the authors before you pass anything on"
        lines = [
            f"## {origin.name}\n",
            f"- from: {origin.place}, split {origin.split}",
            f"- revision: {origin.revision}",
            f"- licence: {licence}",
            f"- commercial use: {use}",
        ]
        if re.search(r"\bsa\b", licence, re.IGNORECASE):
            lines.append("- share alike: what is made of these rows must be passed on under the same licence")
        if re.search(r"\bnd\b", licence, re.IGNORECASE):
            lines.append("- no derivatives: a changed form of these rows must not be passed on")
        sections.append("\n".join(lines) + "\n")
    write_lines(["\n".join(sections).encode()], path)


# --- frozen


def as_frozen(chain: Sequence[Place], frozen: Mapping[str, Origin]) -> list[Place]:
    """Only the place that was used when the lock was written, at the revision it had then."""
    name = chain[0].name
    if name not in frozen:
        raise ValueError(f"{name} is not in the lock file, which has {', '.join(frozen)}: run once without --frozen")
    then = frozen[name]
    if then.choice >= len(chain):
        raise ValueError(f"{name}: the lock file names place {then.choice}, and the recipe has {len(chain)} now")
    place = chain[then.choice]
    now = None if place.hub is None else place.hub.revision
    if now not in (None, then.revision):
        raise ValueError(f"{name}: revision was {then.revision} when the lock was written and is {now} now (--frozen)")
    return [replace(place, frozen_revision=then.revision)]


def check_frozen(origin: Origin, frozen: Origin | None) -> None:
    """ValueError names what is not as it was."""
    if frozen is None:
        return
    for key in ("place", "revision", "split", "choice", "max_rows"):
        now, then = getattr(origin, key), getattr(frozen, key)
        if now != then:
            raise ValueError(f"{origin.name}: {key} was {then} when the lock was written and is {now} now (--frozen)")


# --- opening


def open_first(
    chain: Sequence[Place],
    task: FetchTask,
    *,
    data_dir: Path,
    max_rows: int | None,
    frozen: Origin | None,
    allow_non_commercial: bool,
) -> OpenedSource:
    """The first place that can be had; one that an earlier run fetched goes before those that it could not have."""
    here = already_fetched(chain, data_dir, max_rows)
    chain = [here] if here else chain
    failures: list[Exception] = []
    for place in chain:
        refuse_non_commercial([place], allow=allow_non_commercial)
        try:
            opened = open_place(place, task, data_dir, max_rows, allow_non_commercial)
        except (ValueError, HubUnavailableError) as error:
            failures.append(error)
            if place is not chain[-1]:
                task.say(f"{error}; trying the next of {len(chain)} places")
            continue
        check_frozen(opened.origin, frozen)
        if place.choice:
            task.say(f"used fallback {place.choice}: {opened.origin.place}")
        return opened
    if len(failures) == 1:
        raise failures[0]
    kind = HubUnavailableError if any(isinstance(one, HubUnavailableError) for one in failures) else ValueError
    raise kind(f"{chain[0].name}: none of its {len(failures)} places can be had:\n" + "\n".join(map(str, failures)))


def already_fetched(chain: Sequence[Place], data_dir: Path, max_rows: int | None) -> Place | None:
    """The first hub place of a source that an earlier run fetched whole."""
    for place in chain:
        if place.hub is not None and fetched(hub_folder(place, place.hub, data_dir, max_rows)) is not None:
            return place
    return None


def open_place(
    place: Place, task: FetchTask, data_dir: Path, max_rows: int | None, allow_non_commercial: bool
) -> OpenedSource:
    """The rows of one place as JSONL files."""
    if place.hub is not None:
        return open_hub(place, place.hub, task, data_dir, max_rows, allow_non_commercial)
    if place.module is not None:
        return open_module(place, place.module, task, data_dir)
    files = tuple(scannable_file(file, data_dir, task) for file in place.files)
    listed = ", ".join(str(file) for file in place.files[:3]) + (" …" if len(place.files) > 3 else "")
    converted = [file for file in files if file not in place.files]
    origin = place.origin(listed, content_hash(place.files))
    return OpenedSource(origin=origin, files=files, images=images_named(converted, data_dir))


def open_hub(
    place: Place, hub: HubSource, task: FetchTask, data_dir: Path, max_rows: int | None, allow_non_commercial: bool
) -> OpenedSource:
    """A split of a hub data set, fetched if no earlier run did."""
    folder = hub_folder(place, hub, data_dir, max_rows)
    done = fetched(folder)
    if done is None:
        hub = settled(place, hub, folder, task)
        licensed = replace(place, licence=hub.licence, commercial_use=place.commercial_use)
        if place.commercial_use is None:
            licensed = replace(licensed, commercial_use=forbids_or_none(hub.licence))
        refuse_non_commercial([licensed], allow=allow_non_commercial)
        done = fetch_split(hub, place.split, folder, task, read_rows=place.read_rows, max_rows=max_rows)
        task.say(f"{done.rows} rows of {hub.id}")
    use = forbids_or_none(done.licence) if place.commercial_use is None else place.commercial_use
    name = f"{hub.id}:{hub.config}" if hub.config else str(hub.id)
    more = {"licence": done.licence, "commercial_use": use, "max_rows": max_rows, "rows": done.rows}
    origin = place.origin(name, done.revision, **more)
    return OpenedSource(origin=origin, files=done.files, images=images_named(done.files, data_dir))


def settled(place: Place, hub: HubSource, folder: Path, task: FetchTask) -> HubSource:
    """The source at one commit: what a branch means is asked once, so that a fetch taken up again stays with it."""
    record = folder / "REVISION.json"
    if not record.is_file():
        hub = pinned(replace(hub, revision=hub.revision or place.frozen_revision), task)
        write_lines([orjson.dumps({"revision": hub.revision, "licence": hub.licence})], record)
    return replace(hub, **orjson.loads(record.read_bytes()))


def hub_folder(place: Place, hub: HubSource, data_dir: Path, max_rows: int | None) -> Path:
    """Where the JSONL of a hub place lies: another folder for everything that makes other rows of it."""
    fields = [hub.id, hub.revision, hub.config, hub.split_on_hub(place.split), hub.files, hub.columns, max_rows]
    return source_folder(data_dir, str(hub.id), [*fields, place.code if place.read_rows else ""])


def source_folder(data_dir: Path, label: str, fields: list[Any]) -> Path:
    """data_dir/sources/LABEL-HASH."""
    key = xxhash.xxh3_64_hexdigest(orjson.dumps([FORMAT_VERSION, *fields]))
    return images_of_sources(data_dir).folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', label)[:48]}-{key}"


def images_of_sources(data_dir: Path) -> ImageFolder:
    """Where the images of all sources lie."""
    return ImageFolder(data_dir / "sources")


def images_named(parts: Sequence[Path], data_dir: Path) -> ImageFolder | None:
    """Where the images lie that parts name which were written here; None where they name none."""
    named = any((part.parent / NOTE).is_file() for part in parts)
    return images_of_sources(data_dir) if named else None


def scannable_file(file: Path, data_dir: Path, task: FetchTask) -> Path:
    """The file itself where it can be scanned as it is; else as JSONL, converted once: again where it has changed."""
    holds_images = file_holds_images(file)
    if is_plain_jsonl(file) and not holds_images:
        return file
    state = file.stat()
    fields = [str(file), state.st_size, state.st_mtime_ns, *(["images"] if holds_images else [])]
    part = source_folder(data_dir, file.name, fields) / "part-00000.jsonl"
    if not part.exists():
        task.say(f"converting {file.name}, {state.st_size / 1e6:.1f} MB")
        if holds_images:
            lines = ImageLines(images=images_of_sources(data_dir), place=str(file), folder=file.parent)
            write_lines(lines.lines(file_rows(file), part), part)
        else:
            write_lines(json_lines(file), part)
    return part


def open_module(place: Place, module: ModuleFile, task: FetchTask, data_dir: Path) -> OpenedSource:
    """The rows that a dataset module returns, written once for each text that it has had."""
    keys = [place.code, module.function, place.split, dict(place.options)]
    part = source_folder(data_dir, module.path.stem, keys) / "part-00000.jsonl"
    if not part.exists():
        config = DatasetConfig(name=place.name, module_keys=dict(place.options))
        rows, decodes_images = without_decoding(load_rows(module, config, place.split, None))
        first, rows = rows_with_first(rows)
        if decodes_images or has_image(first):
            lines = ImageLines(images=images_of_sources(data_dir), place=f"{module.path}, {place.split}")
            if hasattr(load_module(module.path), COLLATOR_FUNCTION):
                task.say(f"{COLLATOR_FUNCTION} of {module.path.name} is not asked: a mixture has one collator for all")
            write_lines(lines.lines(rows, part), part)
        else:
            write_lines(map(row_line, rows), part)
    origin = place.origin(module.path.name, place.code)
    return OpenedSource(origin=origin, files=(part,), images=images_named([part], data_dir))


def content_hash(files: Sequence[Path]) -> str:
    """A hash of the sizes of files and of what they begin and end with."""
    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(size - SAMPLED_BYTES, 0))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
