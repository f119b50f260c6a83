"""Folders on storage that fsspec reaches (s3://, gs://, sftp://, file://): fetched before a task, put back after it.

`files.json` in each folder there has the SHA-256 of every file that counts. What will be written is taken out of it first,
and named in it when all is there, so that of an upload that was killed nothing passes for finished. Such storage has no
locks: who finds this list changed since the folder was fetched puts nothing, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from compile_steer.artifacts.contents import file_hashes
from compile_steer.artifacts.files import digest, parse_record, read_json, save_json, sha256
from compile_steer.artifacts.paths import require_inside
from compile_steer.artifacts.provenance import PROVENANCE
from compile_steer.artifacts.writing import new_file
from compile_steer.common.errors import ArtifactError, RecipeError, library_errors
from compile_steer.common.reading import parse_json

TABLE = "fleet.json"
_LIST = "files.json"
_GO_ON = "Nothing that lies on this machine is lost; the same command goes on."


class _Storage:
    """What lies below a URL; what keeps it from being read or written is an `ArtifactError`."""

    def __init__(self, url: str) -> None:
        if "://" not in url:
            needed = "s3://BUCKET/FOLDER, file:///FOLDER or the like; a folder that all workers see can be --out"
            raise RecipeError(f"--store {url} is no URL. Needed: {needed}.")
        self.url = url
        with self._asked("opened"):
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(url)

    def _asked(self, action: str) -> AbstractContextManager[None]:
        needed = f"Needed: storage that this account may read and write, and its library. {_GO_ON}"
        return library_errors(lambda reason: ArtifactError(f"{self.url} cannot be {action} ({reason}). {needed}"))

    def _read(self, name: str) -> bytes:
        with self._asked("read"), suppress(FileNotFoundError):
            self._fs.invalidate_cache()  # others write there too
            return bytes(self._fs.cat_file(f"{self._root}/{name}"))
        return b""

    def write(self, name: str, source: Path | bytes) -> None:
        fs, path = self._fs, f"{self._root}/{name}"
        is_file = isinstance(source, Path)
        put = partial(fs.put_file, str(source), path) if is_file else partial(fs.pipe_file, path, source)
        with self._asked("written to"):
            try:
                put()
            except FileNotFoundError:  # its folder; object storage has none
                fs.makedirs(fs._parent(path), exist_ok=True)
                put()

    def require_begun(self) -> None:
        """Raise `ArtifactError` where the first table is gone: it is other storage that answers now, or an empty mount."""
        if not self._read(TABLE):
            raise ArtifactError(f"{self.url} was lost: its {TABLE} is gone. Removed, or no longer mounted? {_GO_ON}")

    def _listed(self, folder: Path) -> dict[str, str]:
        self.require_begun()
        content = self._read(f"{folder.name}/{_LIST}")
        try:
            return parse_record(parse_json(content.decode()), dict[str, str], _LIST, "")
        except (ValueError, ArtifactError):  # none yet, or written by half
            return {}

    def _list(self, folder: Path, files: Mapping[str, str]) -> None:
        self.write(f"{folder.name}/{_LIST}", json.dumps(files).encode())

    def _seen(self, folder: Path) -> Path:
        """The list as it was last fetched or put here: it tells which side has changed."""
        return folder / f".store-{digest(self.url)[:12]}.json"

    def fetch(self, folder: Path) -> dict[str, str]:
        """Fetch what `folder` lacks, and what was changed there and not here; returns the list."""
        listed, copy = self._listed(folder), self._seen(folder)
        seen = read_json(copy, "Remove it.") if copy.is_file() else {}
        for name, expected in listed.items():
            path, there = folder / name, f"{folder.name}/{name}"
            require_inside(folder, Path(name), f"{self.url}/{there}", "copy it yourself")
            if path.is_file() and (seen.get(name) == expected or sha256(path) != seen.get(name)):
                continue  # that very file, or one that was made here and is not put yet
            with new_file(path) as temporary:
                with self._asked("read"), suppress(FileNotFoundError):
                    self._fs.get_file(f"{self._root}/{there}", str(temporary))
                if not temporary.is_file() or sha256(temporary) != expected:
                    remedy = f"Remove {folder.name}/{_LIST} there: the same command then puts, or makes, again what is missing."
                    raise ArtifactError(f"{self.url}/{there} is not the file that was put there. {remedy}")
        save_json(copy, listed)
        return listed

    def put(self, folder: Path, fetched: Mapping[str, str]) -> None:
        """Make what is there the same as `folder`; raises where it is not as it was `fetched`."""
        here = file_hashes(folder)
        if self._listed(folder) != fetched:
            raise ArtifactError(
                f"{self.url}/{folder.name} was changed by another fleet meanwhile, and nothing was put there. Let one at a "
                f"time do a recipe. {_GO_ON}"
            )
        kept = {name: value for name, value in here.items() if fetched.get(name) == value}
        if here != fetched:
            self._list(folder, kept)
            # The record that makes an artifact of a folder comes last, for those who load it from there.
            for name in sorted(here.keys() - kept.keys(), key=lambda name: (Path(name).name == PROVENANCE, name)):
                self.write(f"{folder.name}/{name}", folder / name)
            for name in fetched.keys() - here.keys():
                with self._asked("written to"), suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{folder.name}/{name}")
            self._list(folder, here)
        save_json(self._seen(folder), here)


@contextmanager
def synced(folder: Path, url: str) -> Iterator[None]:
    """Fetch `folder` from below the URL before the block, and put it there after it; nothing for ''. Raises `ArtifactError`."""
    storage = _Storage(url) if url else None
    fetched = storage.fetch(folder) if storage else {}
    yield
    if storage:
        storage.put(folder, fetched)


def put_table(url: str, table: Mapping[str, Any], report: Callable[[str], None] | None = None) -> None:
    """Put a fleet's table below the URL; nothing for ''. The first one shows the workers that the storage is there.

    Args:
        report: is told what keeps a later table from being put; for the first, without it, that is raised.
    """
    try:
        if url:
            storage = _Storage(url)
            if report is not None:
                storage.require_begun()
            storage.write(TABLE, json.dumps(table, indent=2).encode())
    except ArtifactError as error:
        if report is None:
            raise
        report(str(error))
