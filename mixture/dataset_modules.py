"""Dataset modules: Python files loaded by path, by the contract of llama-cookbook's custom datasets."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import xxhash

from mixture.config import DatasetConfig

Row = dict[str, Any]
Report = Callable[[str], None]

DATASET_FUNCTION = "get_custom_dataset"
COLLATOR_FUNCTION = "get_data_collator"
SCORE_FUNCTION = "score"
REWARD_FUNCTION = "reward"
SCORE_NAME = "SCORE_NAME"
SCORE_IN_THREADS = "SCORE_IN_THREADS"

OTHER_SCORES = frozenset(
    {"step", "epoch", "loss", "perplexity", "tokens", "scored_rows", "examples", "models", "lm_eval"}
)
"""What the evaluation tells beside a module's score."""

# What a failing call may raise through unchanged: the network or the machine failed, not the module.
PASSING_ERRORS = (ConnectionError, TimeoutError, MemoryError)


@dataclass(frozen=True)
class ModuleFile:
    """A dataset module on disk and the function in it that returns rows."""

    path: Path
    function: str = DATASET_FUNCTION


@dataclass(frozen=True)
class ModuleScore:
    """How a module judges a model's answers."""

    function: Callable[[str, Row], float]
    """From the answer and the raw row of its question; means over rows are told."""

    name: str = "score"
    """What the mean is called: the module's SCORE_NAME."""

    in_threads: bool = False
    """Whether answers may be judged at the same time, in threads: the module's SCORE_IN_THREADS."""


class ModuleConfig(SimpleNamespace):
    """What a module sees as `dataset_config`: every key of `dataset:`, by attribute or by item.

    Also holds the fields that llama-cookbook's dataclass has (`dataset`, `data_path`), so its modules run unchanged.
    """

    def __getattr__(self, key: str) -> NoReturn:
        raise AttributeError(f"dataset_config has no key {key!r}; `dataset:` holds {', '.join(sorted(vars(self)))}")

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def __contains__(self, key: object) -> bool:
        return key in vars(self)

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def keys(self) -> Iterable[str]:
        """The keys, so that `dict(dataset_config)` and `f(**dataset_config)` work."""
        return vars(self).keys()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the key is absent or unset."""
        value = vars(self).get(key)
        return default if value is None else value

    def asdict(self) -> dict[str, Any]:
        """All keys and values as a new dict."""
        return dict(vars(self))


def module_config(config: DatasetConfig) -> ModuleConfig:
    """The `dataset_config` object for a module, from the `dataset:` section of a run."""
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "module_keys"}
    return ModuleConfig(**{"dataset": config.name or "custom_dataset", "data_path": "", **own, **config.module_keys})


# --- finding the file


def resolve_module(config: DatasetConfig, *, config_folder: Path, project: Path) -> ModuleFile:
    """The module file that `dataset.file` or `dataset.name` means; ValueError lists the paths tried."""
    if config.file is None:
        key, text, function = "dataset.name", f"{config.name}.py", DATASET_FUNCTION
        tried = [project / "datasets" / text]
    else:
        key = "dataset.file"
        text, function = split_function(config.file)
        path = Path(text).expanduser()
        if path.suffix != ".py":
            raise ValueError(f"dataset.file: {config.file!r} is not a .py file; give PATH.py or PATH.py:FUNCTION")
        folders = [config_folder, project / "datasets", project, Path.cwd()]
        tried = [path] if path.is_absolute() else [folder / path for folder in folders]
    for candidate in tried:
        if candidate.is_file():
            return ModuleFile(candidate.resolve(), function)
    looked = "\n".join(f"  {candidate}" for candidate in dict.fromkeys(tried))
    raise ValueError(f"{key}: no dataset module {text}{suggest_module(Path(text), project)}. Looked for:\n{looked}")


def split_function(file: str) -> tuple[str, str]:
    """`a.py:f` as ("a.py", "f"); a colon that is not followed by an identifier belongs to the path."""
    path, colon, tail = file.rpartition(":")
    return (path, tail) if colon and tail.isidentifier() else (file, DATASET_FUNCTION)


def suggest_module(wanted: Path, project: Path) -> str:
    names = [path.stem for path in sorted((project / "datasets").glob("*.py"))]
    close = difflib.get_close_matches(wanted.stem, names, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (datasets/ holds {', '.join(names)})" if names else ""


# --- checking without running


def check_module(file: ModuleFile) -> None:
    """Check that the file parses and defines the function with three positional arguments, without running it."""
    tree = parse_module(file.path)
    definitions, complete = defined_names(tree.body)
    if file.function not in definitions:
        if not complete:  # `from x import *` may define it; only running the file can tell.
            return
        functions = [name for name, node in definitions.items() if isinstance(node, ast.FunctionDef)]
        close = difflib.get_close_matches(file.function, functions, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        listed = ", ".join(functions) or "no function"
        raise ValueError(f"{file.path}: no function {file.function}; the file defines {listed}{guess}")
    node = definitions[file.function]
    if isinstance(node, ast.FunctionDef) and not node.args.vararg:
        positional = len(node.args.posonlyargs) + len(node.args.args)
        if positional < 3:
            raise ValueError(
                f"{file.path}:{node.lineno}: {file.function} takes {positional} positional arguments, needs three: "
                f"{file.function}(dataset_config, processor, split)"
            )


def parse_module(path: Path) -> ast.Module:
    """The syntax tree of a Python file; ValueError with file and line where it does not parse."""
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}: {(error.text or '').strip()}") from error
    except ValueError as error:  # null bytes, before Python 3.12
        raise ValueError(f"{path}: {error}") from error


def defined_names(body: list[ast.stmt]) -> tuple[dict[str, ast.AST], bool]:
    """Names that top-level statements define, with the defining node; False where `import *` may add more."""
    names: dict[str, ast.AST] = {}
    complete = True
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update({(alias.asname or alias.name).split(".")[0]: node for alias in node.names})
            complete &= "*" not in names
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            branches = node.body + getattr(node, "orelse", []) + handlers + getattr(node, "finalbody", [])
            inner, inner_complete = defined_names(branches)
            names.update(inner)
            complete &= inner_complete
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update({target.id: node for target in targets if isinstance(target, ast.Name)})
    return names, complete


def states_images(path: Path) -> bool:
    """Whether a module's SOURCE says that its rows hold images; the module is read, not run."""
    definitions, _ = defined_names(parse_module(path).body)
    source = definitions.get("SOURCE")
    keywords = source.value.keywords if isinstance(source, ast.Assign) and isinstance(source.value, ast.Call) else []
    return any(
        keyword.arg == "format" and isinstance(keyword.value, ast.Constant) and keyword.value.value == "images"
        for keyword in keywords
    )


# --- loading


def load_module(path: Path) -> ModuleType:
    """The module in a file, run once per process; sibling files can be imported by it, and its objects pickled.

    Its name holds a hash of the text: Hugging Face caches `.map` results by module and function name, so an edited
    file under the old name would get the old rows.
    """
    path = path.resolve()
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Last, so that a dataset called json.py never hides the standard library from everyone else.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # before running it: dataclasses and pickle look the module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise_located(error, path, "while loading the dataset module")
    return module


def module_name(path: Path) -> str:
    """An importable name for the file, unique for its place and its text."""
    stem = "".join(character if character.isalnum() and character.isascii() else "_" for character in path.stem)
    return f"dataset_{stem}_{xxhash.xxh3_64_hexdigest(str(path).encode() + b'|' + path.read_bytes())[:12]}"


def data_collator(file: ModuleFile, processor: Any, config: DatasetConfig | None = None) -> Callable[..., Any] | None:
    """What the module's `get_data_collator(processor[, dataset_config])` returns, or None if it has none."""
    function = getattr(load_module(file.path), COLLATOR_FUNCTION, None)
    if function is None:
        return None
    arguments = [processor]
    if config is not None and positional_capacity(function) >= 2:
        arguments.append(module_config(config))
    try:
        return function(*arguments)
    except Exception as error:
        raise_located(error, file.path, f"in {COLLATOR_FUNCTION}")


def score_function(file: ModuleFile) -> Callable[[str, Row], float] | None:
    """The module's `score(prediction, row)`, or None if it has none."""
    function: Callable[[str, Row], float] | None = getattr(load_module(file.path), SCORE_FUNCTION, None)
    return function


def module_score(file: ModuleFile, *, unprotected: bool) -> ModuleScore | None:
    """The module's `score(prediction, row)`, with what the module says of it, or None without one.

    One that runs code takes `unprotected` too: whether to do so where the machine cannot protect itself.
    """
    function = score_function(file)
    if function is None:
        return None
    if "unprotected" in inspect.signature(function).parameters:
        function = partial(function, **{"unprotected": unprotected})
    module = load_module(file.path)
    name = getattr(module, SCORE_NAME, ModuleScore.name)
    if not isinstance(name, str) or not name or name in OTHER_SCORES:
        raise ValueError(
            f"{file.path}: SCORE_NAME is {name!r}; name what `score` returns, and not {', '.join(sorted(OTHER_SCORES))}"
        )
    return ModuleScore(function, name, bool(getattr(module, SCORE_IN_THREADS, ModuleScore.in_threads)))


# --- calling


def load_rows(
    file: ModuleFile, config: DatasetConfig, split: str, processor: Any, report: Report | None = None
) -> Iterable[Row]:
    """The rows of one split as the module returns them, at most `dataset.limit`: a sequence, or streamed an iterable.

    `report` is told what reached the function. ValueError: the function is missing or raised, has no such split, or
    returned no rows.
    """
    function = getattr(load_module(file.path), file.function, None)
    if not callable(function):
        check_module(file)
        raise ValueError(f"{file.path}: {file.function} is not a function")
    keywords = ratio_keyword(function, file, config, report)
    try:
        result = function(module_config(config), processor, split, **keywords)
    except Exception as error:
        raise_missing_split(error, file, config, split)
        raise_located(error, file.path, f"in {file.function} for split {split!r}")
    rows = limited(pick_split(result, file, config, split), config.limit)
    return checked_rows(rows, file, split)


def ratio_keyword(
    function: Callable[..., Any], file: ModuleFile, config: DatasetConfig, report: Report | None
) -> dict[str, float]:
    """`split_ratio` for the call where the config sets it; ValueError where the function cannot take it."""
    if positional_capacity(function) < 3:
        raise ValueError(f"{file.path}: {file.function} must take (dataset_config, processor, split)")
    if config.split_ratio is None:
        return {}
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "split_ratio" not in parameters and not takes_any:
        raise ValueError(
            f"dataset.split_ratio is {config.split_ratio}, but {file.function} in {file.path} takes no split_ratio: "
            "remove the key, or add `split_ratio=0.8` to the function"
        )
    if report is not None:
        default = getattr(parameters.get("split_ratio"), "default", inspect.Parameter.empty)
        known = "sets none" if default is inspect.Parameter.empty else f"default is {default}"
        report(f"split_ratio {config.split_ratio} from the config; the module's {known}")
    return {"split_ratio": config.split_ratio}


def positional_capacity(function: Callable[..., Any]) -> float:
    """How many positional arguments the function takes."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return float("inf")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds)


def pick_split(result: Any, file: ModuleFile, config: DatasetConfig, split: str) -> Any:
    """The rows themselves, where the function returned a mapping of splits (a DatasetDict)."""
    if not isinstance(result, Mapping):
        return result
    if split not in result:
        raise ValueError(missing_split(file, config, split, list(result)))
    return result[split]


def raise_missing_split(error: Exception, file: ModuleFile, config: DatasetConfig, split: str) -> None:
    """Raise a ValueError that names the splits there are, if the error means that the asked-for one is absent."""
    if isinstance(error, KeyError) and error.args == (split,):
        raise ValueError(missing_split(file, config, split, mapping_keys(error, file.path))) from error
    if "Unknown split" in str(error):
        raise ValueError(f"{split_key(config, split)}: {file.path} has no split {split!r}: {error}") from error


def missing_split(file: ModuleFile, config: DatasetConfig, split: str, present: list[str]) -> str:
    key = split_key(config, split)
    if not present:
        return f"{key}: {file.path} has no split {split!r}; set {key} to a split that it returns"
    unused = [name for name in present if name not in (config.train_split, config.test_split)]
    remedy = f"set {key}: {unused[0]}" if unused else "let the module return it, or name another split"
    return f"{key}: {file.path} has no split {split!r}, only {', '.join(present)}; {remedy}"


def split_key(config: DatasetConfig, split: str) -> str:
    return "dataset.train_split" if split == config.train_split else "dataset.test_split"


def mapping_keys(error: KeyError, path: Path) -> list[str]:
    """Keys of the mapping whose lookup failed: seen in the frame that raised, or written out there; else empty."""
    traceback = error.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    for value in traceback.tb_frame.f_locals.values():
        if isinstance(value, Mapping) and not isinstance(value, ModuleConfig) and error.args[0] not in value:
            return [str(key) for key in value]
    if traceback.tb_frame.f_code.co_filename != str(path):
        return []
    for node in ast.walk(parse_module(path)):
        if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Dict):
            continue
        if node.lineno <= traceback.tb_lineno <= (node.end_lineno or node.lineno):
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    return []


def limited(rows: Any, limit: int | None) -> Any:
    """The first `limit` rows, without touching the others."""
    if limit is None:
        return rows
    if hasattr(rows, "select") and hasattr(rows, "__len__"):
        return rows.select(range(min(limit, len(rows))))
    return list(itertools.islice(row_iterator(rows), limit))


def checked_rows(rows: Any, file: ModuleFile, split: str) -> Iterable[Row]:
    """The rows, if they can be iterated and there is at least one."""
    where = f"{file.function} in {file.path} for split {split!r}"
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise ValueError(f"{where} returned {type(rows).__name__}; return a list of dicts or a Hugging Face Dataset")
    if not hasattr(rows, "__len__"):
        return LocatedRows(rows, file.path)
    if len(rows) == 0:
        raise ValueError(f"{where} returned 0 rows")
    return LocatedRows(rows, file.path) if not hasattr(rows, "__iter__") else rows


class LocatedRows:
    """Streamed or indexed rows as an iterable; an error in the module's code while reading says where."""

    def __init__(self, rows: Any, path: Path) -> None:
        self.rows = rows
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        try:
            yield from row_iterator(self.rows)
        except Exception as error:
            raise_located(error, self.path, "while reading rows")


def row_iterator(rows: Any) -> Iterator[Row]:
    """An iterator over rows, also for map-style data sets that have only a length and items."""
    if hasattr(rows, "__iter__"):
        return iter(rows)
    return (rows[index] for index in range(len(rows)))


def raise_located(error: BaseException, path: Path, doing: str) -> NoReturn:
    """Re-raise an error of a module as a ValueError that names file and line; system errors pass unchanged."""
    if not isinstance(error, Exception) or isinstance(error, PASSING_ERRORS):
        raise error
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error
    lines = []
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
        lines.append(error.lineno)
    where = f"{path}:{lines[-1]}" if lines else str(path)
    raise ValueError(f"{where}: {type(error).__name__}: {error} ({doing})") from error
