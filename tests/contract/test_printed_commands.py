"""Every command on a card does what it says, from another folder and in a process that has nothing of ours."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from transformers.cli.serve import Serve
from typer.main import get_group
from typer.testing import CliRunner

from compile_steer.artifacts.paths import RunPaths
from compile_steer.cli.app import app
from compile_steer.export.adapter import patch_provenance, write_patch
from compile_steer.export.gguf import write_gguf
from compile_steer.export.merged import write_merged
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import load
from compile_steer.models.text import Text
from compile_steer.report import brief
from compile_steer.report.card import model_card
from compile_steer.report.recommendation import Recommendation
from compile_steer.steering.patch import with_patch
from tests.helpers import byte_level
from tests.helpers.tiny import program, random_patch

TOKENS, ASK = 12, 'hello "w1" it\'s'
FORMS = {"tide-closed_form": "adapter", "tide-closed_form-fp32": "merged-fp32", "tide-closed_form-f16": "gguf-f16"}
# Runs each snippet as a stranger's Python does.
STRANGER = """
import contextlib, io, json, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "compile_steer":
            raise ImportError("nothing of ours is installed here")
sys.meta_path.insert(0, Refuse())
printed = []
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        exec(code, {})
    printed.append(stream.getvalue())
print(json.dumps(printed))
"""
Printed = dict[str, dict[str, list[str]]]  # the lines by artifact and by engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Printed]:
    """A folder with one artifact of each form, what base and compiled model answer, and what the cards print."""
    home = tmp_path_factory.mktemp("made")
    byte_level.saved("llama", home / "a model")
    base = load(str(home / "a model"))
    patch, here = random_patch(base, scale=1.5), home / "here"
    recipe = {"ask": ASK, "dtype": "float32", "verify": {"max_new_tokens": TOKENS}}
    record = patch_provenance("tide", "closed_form", patch, base, program("llama"), 0.0)
    printed: Printed = {}
    for name, form in FORMS.items():
        own, folder = replace(record, form=form, recipe=recipe), here / name
        card = model_card(own, folder, None)
        if form == "adapter":
            write_patch(folder, patch, base, own, card)
        else:
            write = write_gguf if form.startswith("gguf") else write_merged
            write(folder, patch, base, form.rpartition("-")[2], own, card)
        printed[name] = commands(folder / "README.md")
    (before,) = continue_prompts(base, [Text(ASK)], max_new_tokens=TOKENS)
    with with_patch(base.model, patch):
        (after,) = continue_prompts(base, [Text(ASK)], max_new_tokens=TOKENS)
    return here, [response_text(base, before), response_text(base, after)], printed


def commands(card: Path) -> dict[str, list[str]]:
    """The code below 'Load it' by the words before it; shell lines apart, Python as a whole."""
    found: dict[str, list[str]] = {}
    tokens = MarkdownIt("commonmark").parse(
        card.read_text(encoding="utf-8").partition("## Load it")[2].partition("\n## ")[0]
    )
    name = ""
    for token in tokens:
        if token.type == "inline":
            name = token.content.partition(":")[0]
        elif token.type == "code_block":
            found[name] = [token.content] if "import" in token.content else token.content.strip().split("\n")
    return found


def test_all_engines_are_named(made: tuple[Path, list[str], Printed]) -> None:
    _here, _answers, printed = made
    assert {name: list(engines) for name, engines in printed.items()} == {
        "tide-closed_form": ["The base, as a folder", "transformers", "vLLM", "llama.cpp", "Ollama"],
        "tide-closed_form-fp32": ["transformers", "transformers serve", "vLLM", "llama.cpp", "Ollama"],
        "tide-closed_form-f16": ["llama.cpp", "Ollama", "transformers"],
    }


def test_every_line_is_run_or_read_with_its_files(
    made: tuple[Path, list[str], Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, (before, after), printed = made
    monkeypatch.chdir(here)
    shell = [
        line
        for engines in printed.values()
        for name, lines in engines.items()
        if name != "transformers"
        for line in lines
    ]
    read = []
    # Those of ours write what the others load.
    for line in sorted(dict.fromkeys(shell), key=lambda line: not line.startswith("compile-steer")):
        program, *words = shlex.split(line)
        if program == "compile-steer":
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (line, done.output)
        elif program == "printf":
            subprocess.run(["sh", "-c", line], check=True)
            paths = [entry.partition(" ")[2] for entry in Path(words[-1]).read_text(encoding="utf-8").splitlines()]
            assert paths and all(Path(path).is_file() and path.startswith("./") for path in paths)
        else:
            read.append((program, words))
    for program, words in read:
        options = dict(zip(words[::2], words[1::2], strict=False))
        if program == "llama-server":
            assert set(options) in ({"-m"}, {"-m", "--lora"}) and all(Path(path).is_file() for path in options.values())
        elif program == "ollama":
            assert words[0] in ("create", "run") and (words[0] == "run" or Path(words[3]).is_file())
        elif program == "transformers":
            assert (
                words[0] == "serve" and Path(words[1], "config.json").is_file() and words[2:] == ["--dtype", "float32"]
            )
            assert {"force_model", "dtype"} <= set(inspect.signature(Serve.__init__).parameters)
        else:
            assert program == "vllm" and words[0] == "serve" and Path(words[1], "config.json").is_file()
            if "--enable-lora" in words:
                name, _, folder = words[words.index("--lora-modules") + 1].partition("=")
                rank = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))["r"]
                assert (name, words[-2:]) == ("tide", ["--max-lora-rank", str(rank)])
    snippets = [code for engines in printed.values() for code in engines["transformers"]]
    stranger = [sys.executable, "-I", "-c", STRANGER]
    ended = subprocess.run(stranger, input=json.dumps(snippets), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    adapter, merged, rounded = json.loads(ended.stdout)
    assert adapter == merged == f"{after}\n" and before != after
    assert rounded.strip("\n") not in (before, "")  # another text than float32's


def test_the_end_of_a_run_prints_commands_that_work(
    made: tuple[Path, list[str], Printed], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, _answers, _printed = made
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(Path(sys.executable).with_name("compile-steer"))])
    stream, folder = StringIO(), here / "tide-closed_form-fp32"
    brief.print_end(Console(file=stream, width=400), Recommendation("one", folder, "", []), RunPaths(here, "tide"))
    lines = [line[17:] for line in stream.getvalue().splitlines() if line.startswith("  ")]
    programs = {}
    for called, *words in (shlex.split(line, comments=True) for line in lines[1:]):
        programs[words[0]] = words[1:]
        if called == "cat":
            assert Path(words[0]).is_file()
        elif words[0] == "export":
            assert CliRunner().invoke(app, words).exit_code == 0 and list(tmp_path.rglob("*.gguf"))
        else:  # a conversation, or minutes of work: its words are read by the command itself
            commands = get_group(app).commands
            assert Path(called).name == "compile-steer" and commands[words[0]].make_context(words[0], words[1:])
    assert {"chat", "export", "new"} <= set(programs)


def test_the_committed_adapter_names_its_base_as_its_card_writes_it() -> None:
    folder = Path(__file__).parents[2] / "adapters" / "ocean-closed_form"
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    printed = commands(folder / "README.md")
    assert printed["The base, as a folder"] == [f"compile-steer base --out {named}"]
    assert f"from_pretrained({named!r}" in printed["transformers"][0]
