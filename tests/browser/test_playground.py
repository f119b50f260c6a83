"""The playground in a real browser, with a tiny model: what its columns show, what acts on them, and what leaves the machine."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compile_steer.artifacts.provenance import Provenance
from compile_steer.models.text import Text
from compile_steer.tools.playground import Playground, require_free, serve
from compile_steer.tools.side_by_side import SIDES, Member, Side, SideBySide
from tests.helpers.small_run import SmallRun

if find_spec("gradio") is None:
    pytest.skip("no gradio here: make test-browser installs it", allow_module_level=True)

ASK = "w42 w43"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> ${document.title='owned'} "
    "{{value}} &amp; **b**"
)


@pytest.fixture
def run(original: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    monkeypatch.chdir(original.root)
    shutil.copytree(original.root / "runs", tmp_path / "runs")
    return SmallRun(tmp_path)


@contextmanager
def opened(page: Any, *members: Member) -> Iterator[SideBySide]:
    models = SideBySide.open(members)
    with serve(Playground(models, 12), require_free(None)) as address:
        page.goto(address)
        page.wait_for_selector("#ask")
        yield models


def ask(page: Any, prompt: str = ASK, enter: bool = False) -> dict[str, str]:
    """What the columns and the verdict say after an answer to the prompt."""
    page.evaluate("for (const old of document.querySelectorAll('#verdict .verdict')) old.remove()")
    page.fill("#prompt textarea", prompt)
    page.press("#prompt textarea", "Enter") if enter else page.click("#ask")
    page.wait_for_selector("#verdict .verdict")
    names = {side: f"#{side} .answer" for side in SIDES} | {"verdict": "#verdict"}
    return {name: str(page.inner_text(selector)) for name, selector in names.items()}


def answer(models: SideBySide, side: Side, strength: float = 1.0) -> str:
    *_, last = models.answer(side, Text(ASK), [strength], 12)
    return models.text(side, last)


def test_columns_show_what_each_model_answers(page: Any, run: SmallRun) -> None:
    with opened(page, Member.read(run.paths.adapter("closed_form"))) as models:
        shown = ask(page)
        for side in SIDES:
            assert answer(models, side) in shown[side]
        assert answer(models, "compiled") not in shown["base"]
        assert "Compiled misses" in shown["verdict"]
        steered, compiled = answer(models, "steered").split(), answer(models, "compiled").split()
        first = next(n for n, (a, b) in enumerate(zip(compiled, steered, strict=True)) if a != b)
        assert page.inner_text("#compiled .differs").strip() == compiled[first]
        assert page.locator("#steered .differs").count() == 0
        assert page.locator("#compiled [title$=nats]").count() == 12
        page.click("#artifact input")
        page.get_by_text("merged/tide-bias-fp32").click()
        shown = ask(page, enter=True)
        assert "whole model" in shown["compiled"]
        assert answer(models, "steered") in shown["compiled"]  # it is exact
        assert ": PASS. KL" in shown["verdict"]


def test_a_compiled_model_without_effect_is_seen(page: Any, run: SmallRun) -> None:
    """The column is computed from the files: with an adapter that does nothing it shows the base, and the verdict fails."""
    adapter = run.paths.adapter("closed_form")
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    Provenance.read(adapter).write(adapter)
    own = Member.read(adapter)
    with opened(page, replace(own, parity=Member.read(run.paths.merged("bias", "fp32")).parity)) as models:
        shown = ask(page)
        assert answer(models, "base") in shown["compiled"]
        assert answer(models, "steered") not in shown["compiled"]
        assert ": FAIL. KL" in shown["verdict"]


def test_text_is_shown_as_text(page: Any, run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Playground, "presets", lambda _self: [HOSTILE, "w9"])
    member = replace(Member.read(run.paths.adapter("closed_form")), name=HOSTILE)
    with opened(page, member):
        monkeypatch.setattr(SideBySide, "text", lambda *_arguments: HOSTILE)
        shown = ask(page)
        for side in SIDES:
            assert HOSTILE in shown[side]
        page.click("#preset input")
        page.wait_for_timeout(300)
        assert "do not fit" in ask(page, " ".join([HOSTILE] * 20))["verdict"]
        assert page.locator("img[src=x], #prompt script, #base script, label script").count() == 0
        assert "owned" not in page.title().replace(HOSTILE, "")


def test_programs_are_toggled_and_scaled_without_websockets(page: Any, run: SmallRun) -> None:
    page.add_init_script("delete window.WebSocket")
    one = Member.read(run.paths.adapter("closed_form"))
    with opened(page, one, replace(one, name="again")):
        both = ask(page)
        assert "x1" not in both["steered"]
        page.get_by_label("again", exact=True).uncheck()
        shown = ask(page)
        assert "x1, 0" in shown["steered"]
        models = SideBySide.open([one])
        for side in SIDES:
            assert answer(models, side) in shown[side]
        page.get_by_label("tide", exact=True).uncheck()
        off = ask(page)
        assert answer(models, "base") in off["steered"]
        assert answer(models, "base") in off["compiled"]


def test_the_server_contacts_no_other_host(page: Any, run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    contacted: list[Any] = []
    connect = socket.socket.connect

    def recorded(self: socket.socket, address: Any) -> None:
        contacted.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    for name in ("http_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "" if "no" in name.lower() else "http://127.0.0.1:9")
    resolve = socket.getaddrinfo

    def resolved(*names: Any, **more: Any) -> Any:
        contacted.append(names)
        return resolve(*names, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    with opened(page, Member.read(run.paths.adapter("closed_form"))):
        ask(page)
    assert {address[0] for address in contacted if isinstance(address, tuple)} <= {"127.0.0.1"}


def test_ctrl_c_ends_it_and_frees_the_port(page: Any, run: SmallRun, original: SmallRun) -> None:
    port = require_free(None)
    command = [sys.executable, "-m", "compile_steer", "play", str(run.paths.out), "--no-browser", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=original.root)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert f"http://127.0.0.1:{port}/" in said
    page.goto(f"http://127.0.0.1:{port}/")
    page.click("#ask")  # while it answers
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert require_free(port) == port
