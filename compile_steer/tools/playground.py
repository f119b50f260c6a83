"""A local web page on which base, steered and compiled model answer beside each other, each token coloured by its KL.

Gradio speaks plain HTTP with server-sent events, so that a browser needs no WebSockets. Nothing is asked of another host: no
telemetry, no fonts, no scripts from outside.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from torch import Tensor

from compile_steer.artifacts.paths import RunPaths, real_path
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import CompileSteerError, RecipeError, plain, require_library
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.tools.side_by_side import SIDES, Member, Side, SideBySide, artifacts_of

HOST = "127.0.0.1"
PORTS = range(7860, 7960)
_PRESETS = 12  # of the run's own prompts, beside the recipe's `ask`
_FULL_COLOUR = 1.0  # nats: a token of so much KL has the full colour
_CSS = """
.answer { line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer h3 { margin: 0 0 4px; }
.answer small, .legend { opacity: .75; font-size: 85%; }
.answer .differs { outline: 2px solid #d9480f; border-radius: 3px; }
.legend span, .answer span { border-radius: 3px; padding: 1px 0; }
.verdict { font-weight: 600; overflow-wrap: anywhere; }
.pass { color: #2b8a3e; } .fail, .error { color: #e03131; }
footer { display: none !important; }
"""
_COLOURS: dict[Side, str] = {"base": "34, 139, 230", "steered": "34, 139, 230", "compiled": "224, 49, 49"}
_LEGEND = (
    f'<p class="legend">Hover a token for its value. Blue: <span style="background: rgba({_COLOURS["base"]}, .5)"> KL(steered‖base) '
    f'</span>, where steering changes what comes next. Red: <span style="background: rgba({_COLOURS["compiled"]}, .5)"> '
    f"KL(steered‖compiled) </span>, where the files differ from the steered model; full colour from {_FULL_COLOUR:g} nat. "
    '<span class="differs" style="outline: 2px solid #d9480f"> Outlined </span>: the first token that is not the steered '
    "model's. Answers are greedy.</p>"
)


def require_free(port: int | None) -> int:
    """A port that nothing listens on: the one given, or the first free one; raises `RecipeError`."""
    for candidate in PORTS if port is None else (port,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                return candidate
    place = f"port {port}" if port is not None else f"every port from {PORTS.start} to {PORTS.stop - 1}"
    raise RecipeError(
        f"{place} of {HOST} cannot be used ({reason}). Name another with --port, or end what listens there."
    )


def require_gradio() -> None:
    """Raise `RecipeError` where the page's library is not installed."""
    require_library("gradio", "play", "the playground", "compile-steer chat answers in the terminal without it.")


class Playground:
    """What the page shows: the models, the artifacts that can be chosen, and the answers as HTML."""

    def __init__(self, models: SideBySide, max_new_tokens: int = 40) -> None:
        self.models, self.max_new_tokens, self.stopping = models, max_new_tokens, threading.Event()
        first, *more = models.members
        self.artifacts = [first.folder]
        for folder in [] if more else artifacts_of(first.folder.parent.parent):
            same = Provenance.read(folder).program_sha256 == first.provenance.program_sha256
            self.artifacts += [folder] * (same and real_path(folder) != real_path(first.folder))

    def presets(self) -> list[str]:
        """The recipe's `ask` and prompts of its test data, as far as the run has kept them."""
        prompts = [str(member.provenance.recipe.get("ask", "")) for member in self.models.members]
        for member in self.models.members:
            rows = RunPaths.of_artifact(member.folder, member.name).prompts
            if rows.is_file():
                lines = rows.read_text(encoding="utf-8").splitlines()
                prompts += [str(json.loads(line).get("prompt", "")) for line in lines[:_PRESETS]]
        return list(dict.fromkeys(filter(None, prompts)))

    def answers(
        self, prompt: str, artifact: str, max_new_tokens: float, *settings: float | bool
    ) -> Iterator[tuple[str, ...]]:
        """Yield the three answers and the verdict as HTML while they grow.

        Args:
            artifact: the folder of one of `artifacts`.
            settings: for each program whether it is on, and its strength.
        """
        strengths = [float(strength) if on else 0.0 for on, strength in zip(settings[::2], settings[1::2], strict=True)]
        texts = {side: self._column(side, "", strengths) for side in SIDES}
        try:
            self._choose(artifact)
            given = dict[Side, Encoded]()
            growing = {s: self.models.answer(s, Text(prompt), strengths, int(max_new_tokens)) for s in SIDES}
            while growing and not self.stopping.is_set():
                for side, parts in list(growing.items()):
                    if (answer := next(parts, None)) is None:
                        del growing[side]
                        continue
                    given[side] = answer
                    texts[side] = self._column(side, escape(plain(self.models.text(side, answer))), strengths)
                    yield (*texts.values(), "")
            if self.stopping.is_set():
                return
            for side, answer in given.items():
                kl = self.models.token_kl(answer, "compiled" if side == "compiled" else "base", strengths)
                tokens = self._tokens(side, answer, given["steered"], kl)
                texts[side] = self._column(side, tokens, strengths, f"mean KL {float(kl.mean()):.2g} nats a token")
            compared = self.models.compare(given["steered"], strengths)
            state = "" if compared.limit is None else "pass" if compared.passed else "fail"
            yield (*texts.values(), f'<p class="verdict {state}">{escape(str(compared))}</p>')
        except CompileSteerError as error:
            yield (*texts.values(), f'<p class="verdict error">{escape(plain(str(error)))}</p>')

    def _choose(self, artifact: str) -> None:
        """Load another artifact of the same run, of those that the page offers."""
        folder = next((path for path in self.artifacts if str(path) == artifact), None)
        if folder is None:
            raise RecipeError("that artifact is not one of this run's.")
        if folder != self.models.members[0].folder:
            self.models = SideBySide.on(self.models.base, [Member.read(folder)])

    def _column(self, side: Side, content: str, strengths: Sequence[float], note: str = "") -> str:
        fixed = side == "base" or (side == "compiled" and not self.models.scalable)
        label = "" if fixed or set(strengths) == {1.0} else " x" + ", ".join(f"{strength:g}" for strength in strengths)
        if side == "compiled" and not self.models.scalable:
            label = " (a whole model: always x1)"
        return f'<div class="answer"><h3>{side}{label}</h3>{content}<br><small>{escape(note)}</small></div>'

    def _tokens(self, side: Side, answer: Encoded, steered: Encoded, kl: Tensor) -> str:
        """The answer's tokens, coloured by their KL; the first that the steered answer has not is outlined."""
        own, other = answer.ids[answer.n_prompt :], steered.ids[steered.n_prompt :]
        same = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
        spans, before = [], ""
        for n, value in enumerate(kl.tolist()):
            # Decoded with what comes before: some tokens are a part of a character, or of a space.
            text = self.models.text(side, Encoded(answer.ids[: answer.n_prompt + n + 1], answer.n_prompt))
            if text.endswith("\ufffd") and n + 1 < len(own):
                continue
            new, before = text[len(before) :], text
            strength = min(value / _FULL_COLOUR, 1) ** 0.5 * 0.6  # a root, as most tokens have little
            css = f"background: rgba({_COLOURS[side]}, {strength:.3f})"
            differs = ' class="differs"' if n == same and side != "steered" else ""
            spans.append(f'<span{differs} style="{css}" title="{value:.3g} nats">{escape(plain(new))}</span>')
        return "".join(spans)


def build(playground: Playground) -> Any:
    """The page as `gradio.Blocks`."""
    # Read when gradio is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio as gr

    members, presets = playground.models.members, playground.presets()
    with gr.Blocks(analytics_enabled=False, title=f"compile_steer: {', '.join(m.name for m in members)}") as page:
        prompt = gr.Textbox(presets[0] if presets else "", label="Prompt", max_lines=6, elem_id="prompt")
        with gr.Row():
            preset = gr.Dropdown(presets, value=None, label="Prompts of the recipe", elem_id="preset", min_width=300)
            names = [f"{path.parent.name}/{path.name}" for path in playground.artifacts]
            folders = list(zip(names, map(str, playground.artifacts), strict=True))
            artifact = gr.Dropdown(folders, value=folders[0][1], label="Artifact", elem_id="artifact", min_width=300)
            length = gr.Slider(
                4, 200, playground.max_new_tokens, step=4, label="Longest answer, in tokens", min_width=300
            )
        settings = []
        for member in members:
            with gr.Row():
                with gr.Column(min_width=300):
                    on = gr.Checkbox(True, label=member.name, info=member.program.describe())
                with gr.Column(min_width=300):
                    settings += [on, gr.Slider(-4, 4, 1, step=0.25, label=f"Strength of {member.name}")]
        with gr.Row():
            ask = gr.Button("Answer", variant="primary", elem_id="ask", scale=4)
            stop = gr.Button("Stop", elem_id="stop")
        columns = []
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=300):
                    columns.append(gr.HTML(f'<div class="answer"><h3>{side}</h3></div>', elem_id=side))
        verdict = gr.HTML(elem_id="verdict")
        gr.HTML(_LEGEND)
        inputs, outputs = [prompt, artifact, length, *settings], [*columns, verdict]
        preset.select(lambda chosen: chosen, preset, prompt, api_visibility="private", show_progress="hidden")
        # One answer at a time: the models are shared, and an adapter has one scale.
        answering = gr.on(
            [ask.click, prompt.submit, *(slider.release for slider in settings[1::2])],
            playground.answers,
            inputs,
            outputs,
            concurrency_limit=1,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=[answering])
    return page


@contextmanager
def serve(playground: Playground, port: int, browser: bool = False) -> Iterator[str]:
    """Serve the page at the address that is yielded; raises `RecipeError` for a port that somebody else has taken."""
    # The library asks its own server whether it is up; a proxy would be asked in its place.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    page = build(playground)
    import gradio as gr

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _app, address, _share = page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=browser,
            share=False,
            ssr_mode=False,
            num_workers=0,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=_CSS,
        )
    except OSError as error:
        raise RecipeError(f"port {port} of {HOST} cannot be used ({error}). Name another with --port.") from error
    try:
        yield address
    finally:
        playground.stopping.set()
        page.close(verbose=False)


def wait() -> None:
    """Return on Ctrl-C."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, handler)
