"""Every command that takes a path says of one that it cannot use which it is: exit code 2, one message, nothing left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import compile_steer
from compile_steer.__main__ import main
from compile_steer.cli.app import app
from compile_steer.tools.serving import runner
from tests.helpers.small_run import SmallRun

# BAD is the path; RECIPE a recipe that is right.
ON_A_RECIPE = {
    **{name: ["BAD"] for name in ("generate-pairs", "extract", "validate", "compile", "merge", "verify", "run")},
    "new": ["x", "--from", "BAD", "--out", "OUT"],
    "import": ["BAD", "--from", "BAD", "--to", "new"],
    "export-vector": ["BAD"],
    "decompile": ["BAD", "--artifact", "BAD"],
    "task-vector": ["BAD", "--artifact", "BAD"],
    "compose": ["BAD", "BAD"],
    "co-load": ["BAD", "BAD"],
    "fleet": ["BAD"],
}
ON_AN_ARTIFACT = {
    "chat": ["BAD", "--ask", "hello"],
    "play": ["BAD"],
    "show": ["BAD"],
    "inspect": ["BAD"],
    "reproduce": ["BAD"],
    "audit": ["BAD", "BAD"],
    "export": ["BAD", "--for", "vllm", "--out", "OUT"],
    "base": ["BAD", "--out", "OUT"],
    "verify-engines": ["BAD", "--engine", "llama.cpp"],
    "push": ["BAD", "--to", "a/b"],
}
BESIDE_A_RECIPE = (
    ["import", "RECIPE", "--from", "BAD", "--to", "new", "--out", "OUT"],
    ["decompile", "RECIPE", "--artifact", "BAD", "--out", "OUT"],
    ["task-vector", "RECIPE", "--artifact", "BAD", "--out", "OUT"],
    ["merge", "RECIPE", "--artifact", "BAD", "--out", "OUT"],
    ["verify", "RECIPE", "--artifact", "BAD", "--out", "OUT"],
    ["fleet", "RECIPE", "--store", "BAD", "--out", "OUT"],
    ["extract", "RECIPE", "--set", "model=BAD", "--out", "OUT"],
    ["extract", "RECIPE", "--set", "data.train=BAD", "--out", "OUT"],
)
KINDS = (
    "missing",
    "empty folder",
    "junk",
    "folder of junk",
    "link to nothing",
    "link to itself",
    "home of nobody",
    "below a file",
    "not UTF-8 \udcff",
)
PACKAGE = Path(compile_steer.__path__[0])
NAMES = ("compile_steer.json", "config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors")


def bad_path(folder: Path, kind: str) -> Path:
    path = folder / f"bad {kind}"
    if kind == "junk":
        path = path.with_suffix(".safetensors")
        path.write_bytes(b"\x00\xff{junk: [\x1b")
    elif kind == "folder of junk":
        path.mkdir()
        for name in NAMES:
            (path / name).write_bytes(b"\x00\xff{junk: [")
    elif kind in ("empty folder", KINDS[-1]):
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "home of nobody":
        path = Path("~nobody at all/bad home of nobody")
    elif kind == "below a file":
        path.write_text("in the way")
        path /= "bad below"
    return path


def ended(
    arguments: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a command that must refuse its input says; it runs in `folder`, and must leave nothing there."""
    monkeypatch.setattr(sys, "argv", ["compile-steer", *arguments])
    monkeypatch.setattr("compile_steer.__main__._stops", [])
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, err
    assert err.startswith("error: ") and "Traceback" not in out + err and len(err) < 3000
    left = [path.name for path in sorted(folder.rglob("*")) if path not in before and path.is_file()]
    assert left == []
    return err


def test_every_command_with_a_path_is_tried() -> None:
    assert {command.name for command in app.registered_commands} == {
        *ON_A_RECIPE,
        *ON_AN_ARTIFACT,
        "glossary",
        "schema",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [*ON_A_RECIPE, *ON_AN_ARTIFACT])
def test_path_that_cannot_be_used_is_named(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_path(tmp_path, kind)
    monkeypatch.setattr(
        runner, "environment", lambda name: runner.Environment(name, Path(), {})
    )  # the engines are not here
    arguments = {**ON_A_RECIPE, **ON_AN_ARTIFACT}[command]
    words = [str(path) if word == "BAD" else word.replace("OUT", str(tmp_path / "out")) for word in arguments]
    said = ended([command, *words], tmp_path, monkeypatch, capsys)
    assert path.name.rstrip(" \udcff") in said or (path.is_symlink() and "nowhere does not exist" in said)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", BESIDE_A_RECIPE, ids=lambda words: f"{words[0]} {words[2]} {words[3]}")
def test_path_beside_a_recipe_that_cannot_be_used_is_named(
    arguments: Sequence[str],
    kind: str,
    run: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = bad_path(tmp_path, kind)
    values = {"RECIPE": str(run.recipe), "OUT": str(run.paths.out)}
    words = [values.get(word, word).replace("BAD", str(path)) for word in arguments]
    assert path.name.rstrip(" \udcff") in ended(words, tmp_path, monkeypatch, capsys)


def test_no_path_goes_through_calls_that_raise_for_links_to_themselves_and_unknown_users() -> None:
    for source in PACKAGE.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert ".resolve()" not in text and ".expanduser()" not in text, f"{source}: use artifacts.paths"
