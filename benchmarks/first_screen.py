"""What the README shows first: a picture, three answers and a table, of the program and the adapter of this repository.

    python -m benchmarks.first_screen

Takes two minutes. The last row of the table is another tool's rule for writing a vector into weights, as its source has
it: the vector becomes a bias of both output projections of the block.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.sax.saxutils import escape

import torch

from benchmarks.ocean import HeldOut, committed_program, ocean
from benchmarks.record import DOCS, ROOT, table
from compile_steer.artifacts.files import save_text
from compile_steer.common.progress import Progress
from compile_steer.lowering.exact import bias_patch
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program

QUESTION, NEW_TOKENS, HELD_OUT = "What are you?", 32, 24
ADAPTER = ROOT / "adapters" / "ocean-closed_form"
MARKS = re.compile(r"(<!-- first screen:start -->\n).*?(<!-- first screen:end -->)", re.DOTALL)
_HEIGHT, _LETTER = 120, 7.2  # of the highest bar; of a letter's width


def main() -> None:
    """Write docs/first_screen.svg, and what stands between the marks of the README."""
    with TemporaryDirectory() as folder:
        run = ocean([], Path(folder), Progress())
    program, model = committed_program(run), run.model
    adapter, exact = reload(ADAPTER, model), bias_patch(program, model.layout)
    answers = {"base": _answer(model), "steered": _answer(model, program), "compiled": _answer(adapter)}
    bars = [_divergence(model, program, answers["steered"], other) for other in (model, adapter)]
    save_text(DOCS / "first_screen.svg", picture(model, answers["steered"], *bars))
    shown = [f"{name:<9} {' '.join(response_text(model, text).split())}" for name, text in answers.items()]
    held_out = HeldOut.of(run, program, HELD_OUT, NEW_TOKENS)
    size = (ADAPTER / "adapter_model.safetensors").stat().st_size
    rows = {
        "ours, exact: a bias in a checkpoint that every engine loads": held_out.patched(exact),
        f"ours, fitted: an adapter of {size / 1000:.0f} kB for the unchanged model": held_out.divergence_of(adapter),
        "another tool's rule: the vector as two biases of its block": held_out.patched(
            _two_biases(exact, model, program)
        ),
    }
    cells = ["hooks in a patched engine: what steering is | 0 % | 100 %"]
    cells += [f"{name} | {held_out.remaining(found):.2%} | {found.top1_agreement:.1%}" for name, found in rows.items()]
    lines = ["```", f"$ {QUESTION}", *shown, "```", "", *table("what runs | left over | same token", cells), ""]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    save_text(ROOT / "README.md", MARKS.sub(lambda marks: f"{marks[1]}{chr(10).join(lines)}{marks[2]}", readme))


def _answer(model: LoadedModel, program: Program | None = None) -> Encoded:
    return continue_prompts(model, [Text(QUESTION)], program, max_new_tokens=NEW_TOKENS)[0]


def _divergence(model: LoadedModel, program: Program, text: Encoded, other: LoadedModel) -> torch.Tensor:
    """KL(steered || other) at each token of the answer, in nats."""
    steered = final_states(model, [text], program).response
    return divergence(model.model, steered, other.model, final_states(other, [text]).response).kl


def _two_biases(exact: WeightPatch, model: LoadedModel, program: Program) -> WeightPatch:
    (bias,), (intervention,) = exact.bias.values(), program.interventions
    names = [model.layout.output_projection(intervention.site.layer, kind).name for kind in ("attn", "mlp")]
    return WeightPatch(bias=dict.fromkeys(names, bias))


def picture(model: LoadedModel, answer: Encoded, base: torch.Tensor, compiled: torch.Tensor) -> str:
    """The steered answer as SVG, above each token how far the base and the compiled model are from the steered one."""
    words = [model.tokenizer.decode([token]) for token in answer.ids[answer.n_prompt :]]
    widths = [max(18.0, _LETTER * len(word.strip()) + 8) for word in words]
    scale, x, parts = _HEIGHT / float(base.max()), 20.0, list[str]()
    for word, width, far, near in zip(words, widths, base.tolist(), compiled.tolist(), strict=True):
        for value, shift, colour in ((far, -6, "#b8bcc4"), (near, 1, "#1a7f4b")):
            height = max(scale * value, 0.8)
            bar = f'x="{x + width / 2 + shift:.1f}" y="{190 - height:.1f}" width="5" height="{height:.1f}" fill="{colour}"'
            parts.append(f"<rect {bar}/>")
        parts.append(f'<text x="{x + width / 2:.1f}" y="208">{escape(word.strip())}</text>')
        x += width
    total = f"{float(base.mean()):.2f}", f"{float(compiled.mean()):.5f}"
    label = (
        f"Asked '{QUESTION}': above each word of the steered model's answer, how far two models are from it (KL, nats). Grey: the "
        f"model without steering, on average {total[0]}. Green: the compiled adapter, {total[1]}."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x + 20:.0f} 224" role="img" aria-label="{escape(label)}">',
            "<style>text{font:13px sans-serif;text-anchor:middle;fill:#222}.l{text-anchor:start}</style>",
            f'<rect width="{x + 20:.0f}" height="224" fill="#fff"/>',
            f'<text x="20" y="24" class="l">{escape(f"“{QUESTION}” How far from the steered model, at each word of its answer:")}</text>',
            '<rect x="20" y="36" width="12" height="12" fill="#b8bcc4"/>'
            f'<text x="38" y="47" class="l">the model without steering (average {total[0]})</text>',
            '<rect x="320" y="36" width="12" height="12" fill="#1a7f4b"/>'
            f'<text x="338" y="47" class="l">the compiled adapter, nothing added while it runs (average {total[1]})</text>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
