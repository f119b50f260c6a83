"""Read rows from a JSONL or JSON file, or from whatever the library `datasets` can load, and check every field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, StrictInt, Tag, TypeAdapter, ValidationError

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import RecipeError, brief, library_errors, require_library
from compile_steer.common.options import Section, Seed
from compile_steer.common.reading import MAX_JSON, Malformed, parse_json, read_json_lines, read_text
from compile_steer.data.shapes import known_shape, reshaped
from compile_steer.models.text import Text

MAX_CHOICES = 26  # as many as there are letters
MAX_ROWS = 500_000  # of a file: all are kept in memory
MAX_LINES = 10  # lines about bad rows of one source; one wrong column would fill the screen
TABLES = (".csv", ".parquet")  # files that `datasets` reads
_MAX_BAD = 10_000  # rows, after which a file is something else, and is read no further


class Dataset(Section):
    """One split of a data set that `datasets.load_dataset` can load; code that comes with it is never run."""

    source: str = Field(
        min_length=1, description="a format ('csv', 'json', 'parquet'), a hub id, or a folder beside the recipe"
    )
    data_files: tuple[str, ...] = Field((), description="the files of a format, beside the recipe or as URLs")
    subset: str | None = Field(None, description="which of the data set's configurations")
    split: str = Field("train", description="or a part of one: 'train[:60%]'")
    columns: dict[str, str | tuple[str, ...]] = Field(
        {}, description="the column of each key that has another name; several columns make one list"
    )
    limit: int | None = Field(None, ge=1, description="number of rows; None: all")
    seed: Seed | None = Field(None, description="of the order in which rows are drawn; None: as they are stored")

    def __str__(self) -> str:
        files = "".join(f"{name}, " for name in self.data_files[:3])
        return f"'{self.source}' ({files}split {self.split})"


Source = Annotated[
    Annotated[Path, Tag("file")] | Annotated[Dataset, Tag("dataset")],
    Discriminator(lambda value: "dataset" if isinstance(value, dict | Dataset) else "file"),
]


class Row(dict[str, Any]):
    """The values of a row by their keys; `place` is where it was read, "train.jsonl:2" or "data.train, row 2"."""

    place = ""


# Something to see (U+200B and the like are characters of no width), and no NUL, which ends a text in what is written in C.
_Text = Annotated[str, Field(strict=True, pattern=r"^[^\x00]*[^\s\x00\p{Cf}][^\x00]*$")]


class _Check(Section):
    id: _Text
    arguments: dict[str, Any] | None = None


def _distinct(choices: list[str]) -> list[str]:
    if len({choice.strip() for choice in choices}) < len(choices):
        raise ValueError("two choices are the same")
    return choices


_Choices = Annotated[list[_Text], Field(min_length=2, max_length=MAX_CHOICES), AfterValidator(_distinct)]
_TEXT = (TypeAdapter[Any](_Text), "text that is not empty and holds no NUL")
_FIELDS: dict[str, tuple[TypeAdapter[Any], str]] = {
    **dict.fromkeys(("prompt", "positive", "negative", "response", "question", "instruction", "system"), _TEXT),
    "history": (
        TypeAdapter(list[tuple[_Text, _Text]]),
        "a list of [user, assistant] pairs of texts that are not empty",
    ),
    "choices": (TypeAdapter(_Choices), f"a list of 2 to {MAX_CHOICES} texts, no two the same"),
    "answer": (TypeAdapter(_Text | StrictInt), "the right choice's number, from 0 on, or its text"),
    "checks": (TypeAdapter(list[_Check]), 'a list of objects {"id": text, "arguments": {...}}'),
}


def checked_row(where: str, row: Any, keys: Sequence[str], optional: Sequence[str], problems: list[str]) -> Row | None:
    """Return the row with its keys in order; or None, and add a line to `problems` for everything wrong with it.

    A row of another known shape (see `shapes`) is brought to these keys first.
    """
    if isinstance(row, Mapping):
        try:
            row = reshaped(row, keys)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            return None
    present = set(row) if isinstance(row, Mapping) else None
    if present is None or not set(keys) <= present <= {*keys, *optional}:
        kind = type(row).__name__ if present is None else brief(sorted(map(str, present)))
        problems.append(f"{where}: found {kind}; needed the keys {', '.join(keys)}.")
        return None
    invalid: dict[str, list[str]] = {}
    for key in row:
        field, needed = _FIELDS[key]
        try:
            field.validate_python(row[key])
        except ValidationError:
            invalid.setdefault(needed, []).append(key)
    problems += [f"{where}: {', '.join(names)} must be {needed}." for needed, names in invalid.items()]
    if invalid:
        return None
    checked = Row({key: row[key] for key in (*keys, *optional) if key in row})
    checked.place = where
    return checked


class Reader:
    """Reads sources relative to `folder`, and gathers all problems so that the caller can raise them at once.

    Attributes:
        problems: a line for each problem so far.
        hashes: SHA-256 of the valid rows of each source, by name. It does not depend on a file's layout.
    """

    def __init__(self, folder: Path, section: str = "data.") -> None:
        self._folder = folder
        self._section = section
        self.problems: list[str] = []
        self.hashes: dict[str, str] = {}

    def rows(self, name: str, source: Path | Dataset, keys: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
        """Return the valid rows of a source, each with all `keys` and those of the `optional` ones that it has.

        A missing or invalid field is a problem. So is an unknown key in a file, which was written for the recipe; the
        other columns of a data set are ignored.
        """
        bad: list[str] = []
        located = self.located(name, source, keys, optional, bad)
        rows = [row for where, value in located if (row := checked_row(where, value, keys, optional, bad)) is not None]
        self.problems += bad[:MAX_LINES]
        if len(bad) > MAX_LINES:
            unread = ", and the rest was not read" if len(bad) > _MAX_BAD else ""
            self.problems.append(f"{self._section}{name}: {len(bad) - MAX_LINES:,} more rows like these{unread}.")
        self.hashes[name] = digest(rows)
        return rows

    def located(
        self, name: str, source: Path | Dataset, keys: Sequence[str], optional: Sequence[str], bad: list[str]
    ) -> Iterable[tuple[str, Any]]:
        """Return each row of a source with its place; lines of a file that are no JSON are added to `bad`."""
        if isinstance(source, Path) and source.suffix not in TABLES:
            return self._lines(name, self._folder / source, keys, bad)
        if isinstance(source, Path):
            source = Dataset(source=source.suffix[1:], data_files=(str(source),))
        return self._table(name, source, keys, optional)

    def _lines(self, name: str, path: Path, keys: Sequence[str], bad: list[str]) -> Iterator[tuple[str, Any]]:
        """Yield each row of a JSON or JSONL file with its place; lines that are no JSON are added to `bad`."""
        count = 0
        try:
            for place, value in _placed(path):
                count += 1
                if isinstance(value, Malformed):
                    bad.append(f"{place}: not JSON ({value}).")
                else:
                    yield place, value
                if len(bad) > _MAX_BAD:
                    return
                if count > MAX_ROWS:
                    raise Malformed(f"it has more than {MAX_ROWS:,} rows")
        except Malformed as error:
            self.problems.append(f"{self._section}{name}: {path} cannot be read ({error}).")
            return
        if not count:
            self.problems.append(
                f"{self._section}{name}: {path} is empty; needed: one JSON object a line with {', '.join(keys)}."
            )

    def _table(self, name: str, source: Dataset, keys: Sequence[str], optional: Sequence[str]) -> list[tuple[str, Any]]:
        """Return ("data.NAME, row N", value) of each row of a data set, under the recipe's keys."""
        label = f"{self._section}{name}"
        if unknown := sorted(set(source.columns) - {*keys, *optional}):
            known = ", ".join((*keys, *optional))
            self.problems.append(f"{label}.columns: {', '.join(unknown)} unknown; known here: {known}.")
        try:
            table = load_table(source, self._folder)
        except RecipeError as error:
            self.problems += [f"{label}: {line}" for line in error.problems]
            return []
        # A column that a key needs may be missing only if the key is optional and the recipe did not name the column.
        present = set(table.column_names)
        shape = () if source.columns else known_shape(present, keys)
        columns = {name: source.columns.get(name, name) for name in shape or (*keys, *optional)}
        named = {key: {column} if isinstance(column, str) else set(column) for key, column in columns.items()}
        lacking = {key: names - present for key, names in named.items() if not names <= present}
        if missing := [key for key in lacking if key not in optional or key in source.columns]:
            names = ", ".join(sorted(set().union(*(lacking[key] for key in missing))))
            self.problems.append(
                f"{label}: {source} has the columns {', '.join(sorted(present))}, but no {names}. Name the column that "
                f"holds each key: columns: {{{', '.join(f'{key}: COLUMN' for key in missing)}}}."
            )
            return []
        if len(table) == 0:
            self.problems.append(f"{label}: {source} has no rows.")
        if source.limit is not None and len(table) < source.limit:
            self.problems.append(f"{label}: found {len(table)} rows in {source}; limit asks for {source.limit}.")
        if source.seed is not None:
            table = table.shuffle(seed=source.seed)
        table = table.select(range(min(len(table), source.limit or len(table))))

        def text(cell: Any) -> Any:
            # A column that holds only numbers is one of numbers, even if the columns beside it in a list hold texts.
            return str(cell) if isinstance(cell, int | float) else cell

        located: list[tuple[str, Any]] = []
        for n, row in enumerate(table):
            cells = {
                key: row[column] if isinstance(column, str) else [text(row[name]) for name in column]
                for key, column in columns.items()
                if key not in lacking
            }
            # An empty cell of an optional key is left out.
            cells = {key: cell for key, cell in cells.items() if key not in optional or cell is not None}
            located.append((f"{label}, row {n}", cells))
        return located


def _placed(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE:LINE", value or `Malformed`) of each line of a JSONL file, ("FILE, row N", value) of a list in JSON."""
    if path.suffix == ".json" and (text := read_text(path, MAX_JSON)).lstrip().startswith("["):
        yield from ((f"{path.name}, row {n}", value) for n, value in enumerate(parse_json(text)))
    else:
        yield from ((f"{path.name}:{number}", value) for number, value in read_json_lines(path))


def load_table(source: Dataset, folder: Path) -> Any:
    """Return the `datasets.Dataset`; raises `RecipeError` for everything that keeps it from being loaded."""
    require_library("datasets", "data", str(source), "A JSONL file needs no library.")
    import datasets

    local = folder / source.source
    files = [name if "://" in name else str(folder / name) for name in source.data_files]
    if not files and not local.is_dir() and source.source in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        # The library would take whatever files of that format lie in the current folder.
        raise RecipeError(f"{source}: the format '{source.source}' needs data_files, the names of its files.")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, below
    bars_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    path = str(local) if local.is_dir() else source.source
    with library_errors(lambda reason: RecipeError(f"{source} cannot be loaded ({reason}).")):
        try:
            return datasets.load_dataset(path, source.subset, data_files=files or None, split=source.split)
        except datasets.exceptions.DatasetGenerationError as error:
            raise (error.__cause__ or error) from None  # it says only that there was one
        finally:
            if not bars_disabled:
                datasets.enable_progress_bars()


def text_of(row: Row) -> Text:
    """Return the text of a row with a prompt, and with a response, earlier turns and a system prompt if it has them."""
    history = tuple((user, reply) for user, reply in row.get("history", []))
    return Text(row["prompt"], row.get("response", ""), history, row.get("system", ""))
