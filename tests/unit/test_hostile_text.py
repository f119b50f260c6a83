"""Text from outside is text on the card and on the page, and one word in a line that a person copies."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from ruamel.yaml import YAML

from compile_steer.artifacts.provenance import EngineName, EngineRecord, Provenance
from compile_steer.common.errors import plain
from compile_steer.export.engine_support import _LOAD, engine_support, load_commands
from compile_steer.lowering.plan import Choice
from compile_steer.report.card import model_card, update_card
from compile_steer.report.page import write_page
from compile_steer.report.recommendation import Recommendation
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun

HARMLESS = "harmless"
HOSTILE = (
    "<script>alert(1)</script><img src=http://evil/x onerror=alert(1)></td></table></svg></style></pre>",
    "\"><b onload=alert(1)> ' onmouseover='x --><b> ]]><b>",
    "`x` ```` || **b** _i_ ~~s~~ [a](javascript:alert(1)) ![i](http://evil/x.png) <http://evil> [b][c] www.evil.com",
    "a\n\n# heading\r\n\n| a | b |\n|---|---|\n| c | d |\n\n---\n- item\n\n```\ncode\n\n    more\x0b\u2028x",
    "a\n---\nlicense: mit\n---\n# not the header\n<!-- SHA-256 of this card with its record and report: 0 -->",
    "{{ 7 * 7 }} {% raw %} {# x #} $x^2_{$ &lt;b&gt; \\| \\` \\[a](b) [a\\](b) [[a](b)](c)",
    "\x1b[31m\u202egnp.exe\u200b\x00\x9b \u2066",
    "[x]: http://evil",
    "> quoted",
    "# heading",
    "--- +++",
    "=",
)


def spoiled(value: Any, text: str) -> Any:
    """A report in which every text is another."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init and field.name != "measure"]  # one of a few
        return replace(value, **{name: spoiled(getattr(value, name), text) for name in names})
    if isinstance(value, dict):
        return {key: spoiled(entry, text) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(spoiled(entry, text) for entry in value)
    return text if isinstance(value, str) else value


class _Page(HTMLParser):
    """The tags with the names of their attributes, without what is drawn; and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.all_tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str | None] = []
        self.text: list[str] = []
        self._drawn = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._drawn += tag == "svg"
        self.all_tags.add(tag)
        self.attributes |= {name for name, _value in attributes}
        if not self._drawn:
            self.links += [value for name, value in attributes if name == "href"]
        if not self._drawn:
            self.tags.append((tag, [name for name, _value in attributes]))

    def handle_endtag(self, tag: str) -> None:
        if not self._drawn:
            self.tags.append(tag)
        self._drawn -= tag == "svg"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(run: SmallRun, path: Path, text: str) -> _Page:
    recipe = run.read().model_copy(update={"name": text, "model": text, "ask": text})
    report = spoiled(ValidationReport.load(run.paths.validation), text)
    parity = replace(
        spoiled(Parity.load(run.paths.adapter("closed_form") / "parity.json"), text), form="merged-fp32", reasons=[text]
    )
    choices = [Choice(text, text, False, None), Choice(text, None, True, text)]
    folder = run.paths.adapter("closed_form")
    write_page(
        path,
        recipe,
        text,
        choices,
        report,
        [parity],
        Recommendation(text, folder, text, [text]),
        {name: {"loss": [2.0, 1.0] * 5} for name in (text, "$x_{$ --></svg><b>")},
        n_validation=8,
    )
    return _Page(path.read_text(encoding="utf-8"))


def test_page_has_the_same_tags_whatever_the_texts_are(original: SmallRun, tmp_path: Path) -> None:
    text = "\n".join(HOSTILE)
    expected, found = (page(original, tmp_path / "page.html", one) for one in (HARMLESS, text))
    assert found.tags == expected.tags
    assert not found.all_tags & {"script", "img", "b", "iframe", "object", "link", "base", "form"}
    assert found.links == expected.links and all(link and link.startswith("#") for link in found.links)
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "srcset")}
    assert sum(plain(text) in part for part in found.text) > 15
    assert not [part for part in found.text if plain(part) != part]


def card(run: SmallRun, text: str, form: str, **changes: Any) -> str:
    """A card in which every text is another but those that decide what the card says."""
    origin = Provenance.read(run.paths.adapter("closed_form"))
    hostile = spoiled(origin, text)
    kept = {
        "form": form,
        "validation_sha256": origin.validation_sha256,
        "members": {text: text},
        "biases": 1,
        **changes,
    }
    parity = spoiled(Parity.load(run.paths.adapter("closed_form") / "parity.json"), text)
    record = EngineRecord(text, text, 5, 0.1, 0.1, 0.1, 0.1, 1.0, 1.0, version=text)
    # A merged checkpoint's validation is read from a file, by its hash.
    return model_card(
        replace(hostile, **kept), Path("made"), run.paths.validation, replace(parity, reasons=[text]), [record]
    )


def _parsed(text: str) -> tuple[dict[str, Any], list[Token]]:
    start, header, body = text.split("---\n", 2)
    assert start == ""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return YAML(typ="safe").load(header), parser.parse(body)


def _shape(tokens: list[Token]) -> Iterator[Any]:
    """What a card is made of but for its texts; a text may be code, and a line of code may be longer."""
    for token in tokens:
        children = [child.type for child in token.children or () if child.type not in ("text", "code_inline")]
        yield token.type, token.tag, tuple(children)


@pytest.mark.parametrize("form", ["adapter", "merged-fp32", "gguf-f16", "patch"])
@pytest.mark.parametrize("text", HOSTILE)
def test_card_has_the_same_structure_whatever_the_texts_are(original: SmallRun, text: str, form: str) -> None:
    header, tokens = _parsed(card(original, text, form, revision="hub:1", model=text))
    _header, expected = _parsed(card(original, HARMLESS, form, revision="hub:1", model=HARMLESS))
    assert list(_shape(tokens)) == list(_shape(expected))
    assert header["base_model"] == header["license"] == text
    assert set(header) == {"library_name", "base_model", "license", "tags"}
    kinds = {child.type for token in tokens for child in token.children or ()} | {token.type for token in tokens}
    assert not kinds & {"link_open", "image", "html_inline", "s_open"}
    assert [token.content.split(":")[0] for token in tokens if token.type == "html_block"] == [
        "<!-- SHA-256 of this card with its record and report"
    ]
    shown = ["".join(child.content for child in token.children or ()) for token in tokens]
    one_line = " ".join(plain(text).split())
    assert sum(one_line in line for line in shown) > 8
    described = [token.content.strip("\n").split() for token in tokens if token.type == "code_block"]
    assert plain(text).split() in described


def test_numbers_and_names_stay_readable_in_the_source(original: SmallRun) -> None:
    source = card(original, "closed_form +0.12 [-0.10, 0.30] 3-grams (x) a.b #5 f16 > 0.1", "adapter")
    assert "- closed_form +0.12 [-0.10, 0.30] 3-grams (x) a.b #5 f16 > 0.1\n" in source


def test_what_a_person_filled_in_is_written_as_yaml(run: SmallRun) -> None:
    folder = run.paths.adapter("closed_form")
    filled = {"license": "a: b # c\n---\n'\"", "base_model": ["- x", "*y", "https://z"]}
    (folder / "README.md").write_text("---\n", encoding="utf-8")
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        YAML().dump(filled, file)
        file.write("---\n")
    for _ in range(2):
        update_card(folder, run.paths.validation)
        header, _tokens = _parsed((folder / "README.md").read_text(encoding="utf-8"))
        assert {**header, **filled} == header


NAMES = (
    *(
        "a b",
        "$(touch ran)",
        "`touch ran`",
        "a;touch ran",
        "'; touch ran; '",
        '"$HOME"',
        "~",
        "*",
        "a\\",
        "&",
        "{x}",
        "%s",
    ),
    *("-x", "--out=/"),
)


def test_shell_lines_give_commands_the_very_names(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines, expected = (
        ['for c in vllm llama-server compile-steer pip ollama; do eval "$c() { printf \'%s\\n\' \\"\\$@\\"; }"; done'],
        [],
    )
    for engine, form in _LOAD:
        for name in NAMES if engine != "transformers" else ():
            line = load_commands(engine, form, folder=name, file=name, base=name, name=name, rank=8)[0]
            lines.append(f"{line}; echo END")
            path = f"./{name}" if name.startswith("-") else name
            whole = f"{name}/{name}"
            whole = f"./{whole}" if name.startswith("-") else whole
            own = f"{path}={path}" if form == "adapter" else path
            expected.append(whole if engine == "llama.cpp" else own)
    artifact = Provenance("n", "b", "adapter", "m", "hub:1", "p", "h", "v", "pass", False, "r", {}, 1, 1.0, "i")
    for name in NAMES:
        (export, *_rest) = engine_support(replace(artifact, model=name), Path("made"))[2].commands
        lines.append(f"{export}; echo END")
        expected.append(f"./{name}" if name.startswith("-") else name)
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = [part.strip("\n").split("\n") for part in done.stdout.split("END\n")[:-1]]
    assert done.stderr == "" and len(words) == len(expected)
    assert [word for word, given in zip(expected, words, strict=True) if word not in given] == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for name in NAMES:
        ours = engine_support(replace(artifact, name=name, model=name, revision="x"), Path(name))
        shell = [line for engine in ours if engine.name != "transformers" for line in engine.commands]
        subprocess.run(["bash", "-c", "\n".join([lines[0], *shell])], cwd=tmp_path, capture_output=True, check=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [*NAMES, "\n", "a\nimport os", '"', "'", "\\", "\x1b", "\ud800", "{0.__class__}"])
def test_python_lines_are_python_and_hold_the_very_names(name: str) -> None:
    for engine, form in _LOAD:
        assert engine in get_args(EngineName)
        lines = load_commands(engine, form, folder=name, file=name, base=name, name=name, rank=8)
        code = "\n".join(lines) if engine == "transformers" else lines[-1]
        if engine == "transformers" or lines[-1].startswith("SamplingParams"):
            texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
            assert name in texts or f"{name}/{name}" in texts
