"""Where rows come from: a JSONL file, or whatever the library `datasets` can load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import RecipeError, require_library
from compile_steer.common.options import Section
from compile_steer.data.fields import FIELDS

_SHOWN = 10
"""Lines about bad rows of one source; a wrong column would otherwise fill the screen."""


class Dataset(Section):
    """One split of a data set that `datasets.load_dataset` can load; code that comes with it is never run."""

    source: str = Field(description="a format ('csv', 'json', 'parquet'), a hub id, or a folder beside the recipe")
    data_files: tuple[str, ...] = Field((), description="the files of a format, beside the recipe or as URLs")
    subset: str | None = Field(None, description="which of a data set's configurations")
    split: str = Field("train", description="or a part of one: 'train[:60%]'")
    columns: dict[str, str | tuple[str, ...]] = Field(
        {}, description="the column of each key, where its name is another; several columns make one list"
    )
    limit: int | None = Field(None, ge=1, description="how many rows; None: all")
    seed: int | None = Field(None, description="rows are drawn in this seed's order; None: as they stand")

    def __str__(self) -> str:
        return f"'{self.source}' (split {self.split})"


def _kind(value: Any) -> str:
    return "dataset" if isinstance(value, dict | Dataset) else "file"


Source = Annotated[Annotated[Path, Tag("file")] | Annotated[Dataset, Tag("dataset")], Discriminator(_kind)]
Row = dict[str, Any]


class Reader:
    """Reads the sources of a recipe in `folder` and gathers every problem, to be raised once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.problems: list[str] = []
        self.hashes: dict[str, str] = {}

    def rows(self, name: str, source: Path | Dataset, keys: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
        """The rows of one source, each with all `keys` and such of the `optional` ones as it has.

        A row with a missing or bad field is a problem, and in a file, of which every row is the recipe's own, one
        with another key too; of a data set's columns the others are ignored.
        """
        bad: list[str] = []
        if isinstance(source, Path):
            given = self._lines(name, self._folder / source, keys, bad)
        else:
            given = self._loaded(name, source, keys, optional)
        rows = [row for where, one in given if (row := _checked(where, one, keys, optional, bad)) is not None]
        self.problems += bad[:_SHOWN]
        if len(bad) > _SHOWN:
            self.problems.append(f"data.{name}: {len(bad) - _SHOWN} more rows like these.")
        self.hashes[name] = digest(rows)
        return rows

    def _lines(self, name: str, path: Path, keys: Sequence[str], bad: list[str]) -> list[tuple[str, Any]]:
        """(where, value) of each line of a JSONL file."""
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"data.{name}: {path} cannot be read ({getattr(error, 'strerror', None) or error}).")
            return []
        if not any(line.strip() for line in lines):
            self.problems.append(
                f"data.{name}: {path} is empty; needed: one JSON object a line with {', '.join(keys)}."
            )
        found: list[tuple[str, Any]] = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path.name}:{number}"
                try:
                    found.append((where, json.loads(line)))
                except json.JSONDecodeError as error:
                    bad.append(f"{where}: not JSON ({error.msg}).")
        return found

    def _loaded(
        self, name: str, source: Dataset, keys: Sequence[str], optional: Sequence[str]
    ) -> list[tuple[str, Any]]:
        """(where, value) of each row of a data set, under the recipe's own keys."""
        unknown = sorted(set(source.columns) - {*keys, *optional})
        if unknown:
            known = ", ".join((*keys, *optional))
            self.problems.append(f"data.{name}.columns: {', '.join(unknown)} unknown; known here: {known}.")
        try:
            table = load(source, self._folder)
        except RecipeError as error:
            self.problems += [f"data.{name}: {line}" for line in error.problems]
            return []
        columns = {key: source.columns.get(key, key) for key in (*keys, *optional)}
        there = set(table.column_names)
        lacking = [key for key, column in columns.items() if not _columns(column) <= there]
        missing = [key for key in lacking if key in keys or key in source.columns]
        if missing:
            wanted = ", ".join(sorted(set().union(*(_columns(columns[key]) for key in missing)) - there))
            self.problems.append(
                f"data.{name}: {source} has the columns {', '.join(sorted(there))}, but no {wanted}. Name the column that "
                f"holds each key: columns: {{{', '.join(f'{key}: COLUMN' for key in missing)}}}."
            )
            return []
        if len(table) == 0:
            self.problems.append(f"data.{name}: {source} has no rows.")
        if source.limit is not None and len(table) < source.limit:
            self.problems.append(f"data.{name}: limit {source.limit} wanted, but {source} has {len(table)} rows.")
        if source.seed is not None:
            table = table.shuffle(seed=source.seed)
        table = table.select(range(min(len(table), source.limit or len(table))))
        held = {key: column for key, column in columns.items() if key not in lacking}
        return [(f"data.{name}, row {n}", _picked(row, held, optional)) for n, row in enumerate(table)]


def _columns(column: str | tuple[str, ...]) -> set[str]:
    return {column} if isinstance(column, str) else set(column)


def _picked(row: Row, columns: dict[str, str | tuple[str, ...]], optional: Sequence[str]) -> Row:
    """A table's row under the recipe's keys; an optional cell that is empty is none."""
    found = {
        key: row[column] if isinstance(column, str) else [_said(row[one]) for one in column]
        for key, column in columns.items()
    }
    return {key: value for key, value in found.items() if key not in optional or value is not None}


def _said(cell: Any) -> Any:
    """A number among texts as text: a table's column that holds only numbers is one of numbers."""
    return str(cell) if isinstance(cell, int | float) else cell


def _checked(where: str, row: Any, keys: Sequence[str], optional: Sequence[str], bad: list[str]) -> Row | None:
    """The row with its keys in order, or None and a line for what is wrong with it."""
    found = set(row) if isinstance(row, dict) else None
    if found is None or not set(keys) <= found <= {*keys, *optional}:
        said = type(row).__name__ if found is None else sorted(found)
        bad.append(f"{where}: found {said}; needed the keys {', '.join(keys)}.")
        return None
    wrong: dict[str, list[str]] = {}
    for key in row:
        if not FIELDS[key].holds(row[key]):
            wrong.setdefault(FIELDS[key].needed, []).append(key)
    bad += [f"{where}: {', '.join(names)} must be {needed}." for needed, names in wrong.items()]
    return None if wrong else {key: row[key] for key in (*keys, *optional) if key in row}


def load(source: Dataset, folder: Path) -> Any:
    """The table; raises `RecipeError` for whatever keeps it from being loaded."""
    require_library("datasets", "data", str(source), "A JSONL file needs no library.")
    import datasets

    local = folder / source.source
    files = [one if "://" in one else str(folder / one) for one in source.data_files]
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            str(local) if local.is_dir() else source.source,
            source.subset,
            data_files=files or None,
            split=source.split,
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise RecipeError(f"{source} cannot be loaded ({reason}).") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
