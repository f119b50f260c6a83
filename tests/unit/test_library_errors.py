"""What libraries raise about files becomes our error with the file's name; sizes that a file claims are its own."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from compile_steer.artifacts.tensors import read_metadata, read_tensors
from compile_steer.common.errors import ArtifactError, CompileSteerError, InternalError, library_errors, plain
from compile_steer.formats.foreign import ImportOptions
from compile_steer.formats.tensors import read_floats
from compile_steer.formats.vectors import read_gguf

_Panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Exception("data did not match any variant"), "data did not match any variant"),
        (_Panic("index out of bounds: the len is 3"), "index out of bounds: the len is 3"),
        (KeyError("rope"), "KeyError 'rope'"),
        (StopIteration(), "StopIteration"),
        (struct.error("unpack requires a buffer of 8 bytes"), "unpack requires"),
        (MemoryError("Unable to allocate 8.00 EiB"), "Unable to allocate"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion"),
        (ValueError("no\nadvice on something else"), "ValueError no"),
        (OSError(28, "No space left on device"), "No space left"),
        (ValueError("x " * 5000), "characters]"),
    ],
)
def test_whatever_a_library_raises_is_told_with_its_first_line(error: BaseException, reason: str) -> None:
    with pytest.raises(ArtifactError) as caught, library_errors(lambda words: ArtifactError(f"file.x ({words}).")):
        raise error
    assert str(caught.value).startswith("file.x (") and reason in str(caught.value)
    assert len(str(caught.value)) < 400 and "advice" not in str(caught.value)


@pytest.mark.parametrize("error", [InternalError("ours"), ArtifactError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_our_own_errors_and_a_stop_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, library_errors(lambda _words: ArtifactError("another")):
        raise error
    assert caught.value is error


def test_a_long_problem_keeps_its_start_and_its_end() -> None:
    (problem,) = CompileSteerError(f"model {'x' * 10**6} is unknown; use another.").problems
    assert len(problem) < 5000 and problem.startswith("model x") and problem.endswith("use another.")


@pytest.mark.parametrize(
    "text",
    ["\x1b]52;c;ZXZpbA==\x07", "\x1b]8;;http://x\x1b\\", "a\rb", "a\x08b", "\x9b31m", "\u202egnp", "\u2066x", "\x00", "\ud800",
     "\U000e0041", "\u2028", "\x7f", "\x0b"],
)  # fmt: skip
def test_nothing_in_plain_text_acts_on_a_terminal(text: str) -> None:
    shown = plain(f"é 語 👩‍🔬\n\t{text}")
    assert (shown.startswith("é 語 👩‍🔬\n\t") and shown[8:].isprintable() is False) or "\\" in shown
    assert all(character.isprintable() or character in "\n\t\u200d" for character in shown)
    shown.encode()


def _archive_of_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("x/data/0", bytes(50_000_000))


def _one_number_repeated(path: Path) -> None:
    torch.save(torch.ones(1).expand(10**12), path)


def _pickle_of_code(path: Path) -> None:
    path.write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")


@pytest.mark.parametrize("build", [_archive_of_zeros, _one_number_repeated, _pickle_of_code])
def test_torch_file_that_would_fill_the_memory_or_run_code(
    build: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "layer_1.pt")
    with pytest.raises(ArtifactError, match=r"layer_1\.pt (claims more numbers|is damaged)"):
        read_floats(tmp_path / "layer_1.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 75) + b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}   \0\0\0\0',
        struct.pack("<Q", 75) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1152921504606846976]}}   \0\0\0\0',
        struct.pack("<Q", 8) + b"[[[[[[[[",
        b"",
    ],
)
def test_safetensors_sizes_are_compared_with_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata):
        with pytest.raises(ArtifactError, match=r"x\.safetensors is damaged"):
            read(path)


def _gguf(kv_count: int, tensor_count: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, kv_count) + rest


_STRING, _ARRAY = 8, 9
_KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "content",
    [
        _gguf(2**62, 0),
        _gguf(0, 2**62),
        _gguf(1, 0, struct.pack("<Q", 2**62) + b"key"),
        _gguf(1, 0, _KEY + struct.pack("<IQ", _STRING, 2**60)),
        _gguf(1, 0, _KEY + struct.pack("<IIQ", _ARRAY, _STRING, 2**60)),
        _gguf(1, 0, _KEY + struct.pack("<I", _ARRAY) + struct.pack("<IQ", _ARRAY, 1) * 5000),
        _gguf(0, 1, _KEY + struct.pack("<I4QIQ", 4, *[2**16] * 4, 0, 0)),
        _gguf(0, 1, _KEY + struct.pack("<I", 2**31)),
        _gguf(0, 1, _KEY + struct.pack("<IQIQ", 1, 2**40, 0, 0)),
        b"GGUF",
        b"",
    ],
)
def test_gguf_counts_and_sizes_are_compared_with_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    options = ImportOptions(2, 8, 0, torch.Generator())
    with np.errstate(all="ignore"), pytest.raises(ArtifactError, match=r"x\.gguf"):
        read_gguf(path, options)
