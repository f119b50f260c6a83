"""How much of the steering a compile leaves behind contexts of many lengths, and what makes it more behind long ones.

    python -m benchmarks.contexts

Writes its sections of docs/BENCHMARKS.md, and prints what docs/LOG.md has of the causes. Texts and patches are kept in
runs/contexts, so that it resumes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.__main__ import RECORD
from benchmarks.ocean import STANDARD_COMPILE, committed_program, lowering_of, ocean
from benchmarks.record import ROOT, machine, prose, table, timed
from compile_steer.common.progress import Progress
from compile_steer.data.contexts import in_contexts, long_context
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.forward import run_blocks
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, pad
from compile_steer.pipeline.run import Run
from compile_steer.steering.hooks import steered
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

WORK = ROOT / "runs" / "contexts"
LENGTHS = (40, 128, 256, 512, 1024, 1800)
QUESTIONS, NEW_TOKENS = 8, 32
SCALES, PROMPTS = (0.5, 1.0, -1.0), 24
FITTED = (
    ("closed_form", "alone", False),
    ("closed_form", "in contexts", False),
    ("distill", "in contexts", False),
    ("closed_form", "in contexts", True),
    ("distill", "in contexts", True),
)  # backend, texts, dial
SPANS = ((0, 128), (128, 512), (512, 1024), (1024, 2048))


def written(run: Run, program: Program, prompts: Sequence[Text], path: Path, new_tokens: int) -> list[Encoded]:
    """What the steered model answers, sampled; kept in a file."""
    if not path.is_file():
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": 1.0, "seed": 1}
        torch.save([vars(one) for one in continue_prompts(run.model, prompts, program, **settings)], path)
    return [Encoded(**one) for one in torch.load(path)]


def behind(model: LoadedModel, document: Encoded, answers: Sequence[Encoded], length: int, mode: Any) -> Tensor:
    """Final states [n, d_model] that predict the answers to prompts behind the first tokens of a document, all in one user turn
    of `length` tokens. The document is read once: every answer continues from its keys and values.
    """
    start = _common(answers)  # of the template, before the user's words
    rest = [Encoded(one.ids[start:], one.n_prompt - start) for one in answers]
    batch = pad(rest, range(len(rest)), model.pad_id)
    count = max(0, length - start - round(sum(one.n_prompt for one in rest) / len(rest)))
    prefix = torch.tensor([[*answers[0].ids[:start], *document.ids[:count]]])
    with mode, torch.no_grad():
        cache = model.layout.backbone(input_ids=prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rest))
        seen = torch.cat([torch.ones(len(rest), prefix.shape[1], dtype=torch.long), batch.attention_mask], dim=1)
        output = model.layout.backbone(input_ids=batch.input_ids, attention_mask=seen, past_key_values=cache)
    states: Tensor = output.last_hidden_state[batch.predicts_response]
    return states


def _common(texts: Sequence[Encoded]) -> int:
    rows = zip(*(text.ids for text in texts), strict=False)
    return next(n for n, tokens in enumerate(rows) if len(set(tokens)) > 1)


def by_length(run: Run, program: Program, patches: dict[str, WeightPatch]) -> list[str]:
    """The remaining KL of each patch by the length of the prompt, on held-out questions behind control text: a table."""
    model = run.model
    answers = written(run, program, run.data.heldout[:QUESTIONS], WORK / "heldout.pt", NEW_TOKENS)
    control = "\n\n".join(f"{one.prompt}\n{one.response}" for one in run.data.neutral)
    document = Encoded(tuple(model.tokenizer(control, add_special_tokens=False)["input_ids"]), 0)
    rows: dict[str, list[str]] = {name: [name] for name in ("KL(steered‖base), nats/token", *patches)}
    for length in LENGTHS:
        states = behind(model, document, answers, length, steered(model.model, program))
        base = divergence(model.model, states, model.model, behind(model, document, answers, length, nullcontext()))
        rows["KL(steered‖base), nats/token"].append(f"{base.mean:.3f}")
        for name, patch in patches.items():
            other = behind(model, document, answers, length, with_patch(model.model, patch))
            rows[name].append(f"{divergence(model.model, states, model.model, other).mean / base.mean:.3%}")
    return table(" | ".join(["patch", *map(str, LENGTHS)]), rows.values())


def by_strength(run: Run, program: Program, patches: dict[str, WeightPatch]) -> list[str]:
    """The remaining KL of each patch at other strengths, of what the program leaves at as many times its coefficient: a table."""
    model = run.model
    texts = written(run, program, run.data.heldout[:PROMPTS], WORK / "strength.pt", NEW_TOKENS)
    rows: dict[str, list[str]] = {name: [name] for name in patches}
    for scale in SCALES:
        states, base = (final_states(model, texts, one).response for one in (program.scaled(scale), None))
        kl = divergence(model.model, states, model.model, base).mean
        for name, patch in patches.items():
            with with_patch(model.model, scale * patch):
                left = divergence(model.model, states, model.model, final_states(model, texts).response).mean
            rows[name].append(f"{left / kl:.3%}")
    return table(" | ".join(["patch", *(f"x{scale:g}" for scale in SCALES)]), rows.values())


def causes(run: Run, program: Program, patches: dict[str, WeightPatch]) -> None:
    """Where in a conversation of 2,048 tokens the error is made, and by which tokens."""
    model, top = run.model, 1 + max(patch_top(run, patch) for patch in patches.values())
    prompts = run.data.heldout[:24]
    answers = written(run, program, prompts, WORK / "conversation.pt", NEW_TOKENS)
    turns = [Text(one.prompt, response_text(model, text)) for one, text in zip(prompts, answers, strict=True)]
    text = long_context(model, turns, run.data.neutral, 2048, 1)
    batch = pad([text], [0], model.pad_id)
    first = program.first_layer

    def states(
        mode: AbstractContextManager[Any], stop: int | None, start: int = 0, hidden: Tensor | None = None
    ) -> Tensor:
        with mode, torch.no_grad():
            return run_blocks(model.model, batch.input_ids, batch.attention_mask, start=start, stop=stop, hidden=hidden)

    def hooks() -> AbstractContextManager[Any]:
        return steered(model.model, program, roles=batch.roles)

    plain, own = states(nullcontext(), first + 1), states(hooks(), first + 1)
    size = float((own - plain)[0].norm(dim=-1).mean())
    final, base = states(hooks(), None), states(nullcontext(), None)
    predicts = batch.predicts_response[0]
    places = torch.arange(len(predicts))
    print(f"by position in one conversation of {len(text.ids)} tokens, ||c v|| = {size:.1f}")
    print(
        "| patch | tokens | answers' | remaining KL | ||h|| | error / ||c v|| | its mean / ||c v|| | only before | only here |"
    )
    for name, patch in patches.items():
        made, compiled = states(with_patch(model.model, patch), first + 1), states(with_patch(model.model, patch), None)
        steered_top, student_top = states(hooks(), top), states(with_patch(model.model, patch), top)
        for start, stop in SPANS:
            here = (places >= start) & (places < stop)
            chosen = predicts & here
            error = (made - own)[0, here & (places > 0)]
            all_kl = divergence(model.model, final[0, chosen], model.model, base[0, chosen]).mean
            cells = [divergence(model.model, final[0, chosen], model.model, compiled[0, chosen]).mean]
            for wrong in (places < start, here):  # the error of these tokens alone, from the last edited block on
                mixed = torch.where(wrong[None, :, None], student_top, steered_top)
                other = states(nullcontext(), None, top, mixed)
                cells.append(divergence(model.model, final[0, chosen], model.model, other[0, chosen]).mean)
            left, before, alone = (f"{cell / all_kl:.2%}" for cell in cells)
            norm = float(own[0, here & (places > 0)].norm(dim=-1).mean())
            print(
                f"| {name} | {start} to {stop} | {int(chosen.sum())} | {left} | {norm:.0f} | "
                f"{float(error.norm(dim=-1).mean()) / size:.3f} | {float(error.mean(dim=0).norm()) / size:.3f} | {before} | {alone} |",
                flush=True,
            )


def patch_top(run: Run, patch: WeightPatch) -> int:
    """The last block that the patch edits."""
    names = [set(run.model.layout.linears(block)) for block in range(run.model.layout.n_layers)]
    return max(block for block, own in enumerate(names) if own & set(patch.low_rank))


def compiled(lowering: Lowering, backend: str, name: str) -> WeightPatch:
    """The backend's patch; kept in a file."""
    path = WORK / f"{name}.pt"
    if not path.is_file():
        patch, seconds = timed(lambda: BACKENDS[backend].lower(lowering))
        print(f"{name}: {seconds:.0f} s", flush=True)
        torch.save({module: (edit.B, edit.A) for module, edit in patch.low_rank.items()}, path)
    return WeightPatch({module: LowRank(*factors) for module, factors in torch.load(path).items()})


def main() -> None:
    """Compile on the same texts by themselves and in contexts, and write how much either leaves."""
    torch.manual_seed(0)
    WORK.mkdir(parents=True, exist_ok=True)
    run = ocean(STANDARD_COMPILE, WORK, Progress())
    program, patches = committed_program(run), {}
    lowering = lowering_of(run, program)
    count, more = lowering.options.calibration.prompts, lowering.options.distill.prompts
    prompts, tokens = run.data.calibration[: count + more], lowering.options.calibration.max_new_tokens
    answers = written(run, program, prompts, WORK / "calibration.pt", tokens)
    texts = [Text(one.prompt, response_text(run.model, text)) for one, text in zip(prompts, answers, strict=True)]
    parts = slice(count), slice(count, None)
    joined = [in_contexts(run.model, texts[part], answers[part], 2048, 0) for part in parts]
    fitted = {"alone": [answers[part] for part in parts], "in contexts": joined}
    for backend, name, dial in FITTED:
        own = replace(lowering, options=lowering.options.model_copy(update={"dial": dial}))
        own.__dict__.update(zip(("regression_texts", "training_texts"), fitted[name], strict=True))
        row = f"`{backend}`, texts {name}" + (", `dial: true`" if dial else "")
        patches[row] = compiled(own, backend, re.sub(r"\W+", "-", row).strip("-"))
    longest = sorted((len(one.ids) for one in joined[0]), reverse=True)[:3]
    sizes: dict[str, object] = {
        "alone": sum(len(one.ids) for one in answers[:count]),
        "joined": sum(len(one.ids) for one in joined[0]),
    }
    sizes |= {"longest": ", ".join(map(str, longest)), "questions": QUESTIONS, "prompts": PROMPTS, "tokens": NEW_TOKENS}
    introduction = prose("contexts: introduction", count=count, more=more, machine=machine(), **sizes)
    tables = by_length(run, program, patches), by_strength(run, program, patches)
    print(
        RECORD.save_section("By length of the context, and by strength", [introduction, "", *tables[0], "", *tables[1]])
    )
    causes(run, program, patches)


if __name__ == "__main__":
    main()
