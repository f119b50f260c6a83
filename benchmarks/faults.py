"""The verifier's own power: faults planted in real artifacts on disk, each put before the whole of `verify`.

    python -m benchmarks.faults

Resumes: what docs/verifier.jsonl holds is not verified again, so delete it to begin anew.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from scipy.stats import binomtest

from benchmarks.ocean import compile_committed, ocean
from benchmarks.record import ROOT, Record, prose, table, timed
from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import ProgressBars
from compile_steer.pipeline.artifacts import make_reference
from compile_steer.pipeline.run import Run
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact
from tests.helpers import planted
from tests.helpers.planted import Fault, VerifierState

RUNS, LINEAR = ROOT / "runs" / "faults", "linear"
SETTINGS = ["compile.backends=[bias,closed_form]", "verify.forms=[adapter,merged-fp32]", "verify.long=1"]
RESPONSE_ONLY = "another program"  # the hash that stands for it: it lies in no file
SEEDS = range(100, 140)  # of the false alarms
OF_THE_FILE = "it is not what was compiled"  # how the verifier's reason begins
# Fewer texts than the faults have: there a sound artifact is the likelier to look like another model.
FEWER = dict.fromkeys(("heldout", "pairs", "neutral", "prompts"), 8)
FEWER |= {"max_new_tokens": 16, "prompts_per_set": 1, "long": 0, "capability": 4}

FAULTS = (
    Fault("none", "adapter", planted.untouched),
    Fault("none", "merged-fp32", planted.untouched),
    Fault("sign flipped", "adapter", planted.scaled(-1.0)),
    Fault("coefficient x1.1", "adapter", planted.scaled(1.1)),
    Fault("coefficient x0.9", "adapter", planted.scaled(0.9)),
    Fault("coefficient x1.01", "adapter", planted.scaled(1.01)),
    Fault("one block late", "adapter", planted.moved(1)),
    Fault("one block early", "adapter", planted.moved(-1)),
    Fault("emptied", "adapter", planted.scaled(0.0)),
    Fault("rank cut to 1", "adapter", planted.rank_cut, several_ranks=True),
    Fault("alpha doubled", "adapter", planted.configured(lora_alpha=lambda old: 2 * old)),
    # At rank 1 that divides by 1 as LoRA does.
    Fault("read as rslora", "adapter", planted.configured(use_rslora=True), several_ranks=True),
    Fault("one tensor zeroed", "adapter", planted.largest_zeroed),
    Fault("one pair missing", "adapter", planted.largest_missing),
    Fault("cast to fp16 with overflow", "adapter", planted.overflown),
    Fault("of another model of the same shape", "adapter", planted.of_another_model),
    Fault("for another base revision", "adapter", planted.claims(revision="sha256:another")),
    Fault("file truncated", "adapter", planted.truncated),
    Fault("a hook left on in the verifier's base", "adapter", planted.untouched, "hooked base"),
    Fault("sign flipped", "merged-fp32", planted.times_merged(-1.0)),
    Fault("coefficient x1.1", "merged-fp32", planted.times_merged(1.1)),
    Fault("coefficient x0.9", "merged-fp32", planted.times_merged(0.9)),
    Fault("bias dropped", "merged-fp32", planted.times_merged(0.0)),
    Fault("merged twice", "merged-fp32", planted.times_merged(2.0)),
    Fault("one block late", "merged-fp32", planted.merged_elsewhere(1)),
    Fault("biases off in the config", "merged-fp32", planted.biases_off),
    Fault("other rotary base in the config", "merged-fp32", planted.other_rotation),
    Fault("merged into another revision of the base", "merged-fp32", planted.of_another_revision),
    Fault("tokenizer swapped", "merged-fp32", planted.other_tokenizer),
    Fault("chat template swapped", "merged-fp32", planted.other_template),
    Fault("of another program", "merged-fp32", planted.claims(program_sha256="another")),
    Fault("positions ignored", "merged-fp32", planted.claims(program_sha256=RESPONSE_ONLY), "response only"),
    Fault("a hook left on in the verifier's base", "merged-fp32", planted.untouched, "hooked base"),
)


@dataclass(frozen=True)
class Verdict:
    """What the verifier reported: `reasons` are the gates that it missed, or why it was refused. `seed` is a false alarm's."""

    fault: str
    form: str
    caught: bool
    reasons: list[str]
    seconds: float
    seed: int | None = None


def prepared(progress: ProgressBars) -> Run:
    """The committed program compiled and merged; what is there is kept. With linear edits alone in the folder `LINEAR`."""
    run = ocean(SETTINGS, RUNS, progress)
    compile_committed(run)
    settings = ["compile.backends=[closed_form]", "compile.dial=true", "verify.forms=[adapter]"]
    compile_committed(ocean(settings, RUNS / LINEAR, progress))
    return run


@contextmanager
def verifier(run: Run, state: VerifierState) -> Iterator[tuple[Reference, str]]:
    """The reference, and the hash of the program that it is about; what is wrong with the verifier holds inside the block."""
    program, program_sha256 = run.program, run.program_sha256
    if state == "response only":
        only = tuple(replace(one, positions="response") for one in program.interventions)
        program, program_sha256 = Program(only, program.model, program.revision), RESPONSE_ONLY
    with steered(run.model.model, program) if state == "hooked base" else nullcontext():
        yield make_reference(run, program), program_sha256


def verdict(run: Run, against: tuple[Reference, str], fault: Fault, seed: int | None = None) -> Verdict:
    """Plant the fault in a copy and have it verified; a refusal is as good as a gate."""
    reference, program_sha256 = against
    paths = RunPaths(run.paths.out / LINEAR, run.recipe.name) if fault.several_ranks else run.paths
    sound = paths.adapter("closed_form") if fault.form == "adapter" else paths.merged("bias", "fp32")

    def reasons() -> list[str]:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "faulty"
            shutil.copytree(sound, folder)
            planted.plant(fault.plant, folder, Path(run.model.source))
            try:
                return verify_artifact(reference, folder, program_sha256).reasons
            except ArtifactError as error:
                return ["refused: " + " ".join(error.problems).replace(str(folder), "it")]

    problems, seconds = timed(reasons)
    return Verdict(fault.name, fault.form, bool(problems), problems, seconds, seed)


def verdicts(run: Run, found: list[Verdict]) -> Iterator[Verdict]:
    """The verdicts that `found` lacks, one after the other: of the faults, then of exact compiles on other texts."""
    done = {(one.fault, one.form, one.seed) for one in found}
    for state in dict.fromkeys(fault.verifier for fault in FAULTS):
        left = [one for one in FAULTS if one.verifier == state and (one.name, one.form, None) not in done]
        if left:
            with verifier(run, state) as against:
                yield from (verdict(run, against, fault) for fault in left)
    exact = Fault("none", "merged-fp32", planted.untouched)
    for seed in SEEDS:
        if (exact.name, exact.form, seed) not in done:
            other = elsewhere(run, seed)
            with verifier(other, "sound") as against:
                yield verdict(other, against, exact, seed)


def elsewhere(run: Run, seed: int) -> Run:
    """The same run with another seed, `FEWER` texts, and its held-out prompts, test pairs and control texts begun elsewhere."""

    def turned(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        start = 7 * seed % len(rows)
        return (*rows[start:], *rows[:start])

    data = run.data
    data = replace(data, heldout=turned(data.heldout), test=turned(data.test), neutral=turned(data.neutral))
    recipe = run.recipe.model_copy(update={"verify": run.recipe.verify.model_copy(update=FEWER)})
    return Run(recipe, run.paths, replace(run.context, data=data, seed=seed))


def report(found: list[Verdict]) -> list[str]:
    """The faults with what caught them, and the rate of false alarms."""
    faults = [one for one in found if one.fault != "none"]
    alarms = [one for one in found if one.fault == "none"]
    missed = [f"{one.fault} ({one.form})" for one in faults if not one.caught]
    by_file = [one for one in faults if one.caught and all(reason.startswith(OF_THE_FILE) for reason in one.reasons)]
    lines = [
        f"Caught: {sum(one.caught for one in faults)} of {len(faults)} faults. Missed: {', '.join(missed) or 'none'}.",
        "",
        f"{len(by_file)} of them only by holding what is on disk against what the compiler had in memory "
        f"({', '.join(f'{one.fault}, {one.form}' for one in by_file) or 'none'}): a mistake made before that is no fault to the verifier "
        "where the result is as near the steered model as the gates ask.",
    ]
    if alarms:
        raised = sum(one.caught for one in alarms)
        high = binomtest(raised, len(alarms)).proportion_ci(method="wilson").high
        lines += [
            "",
            f"False alarms: {raised} of {len(alarms)} artifacts without a fault (95 % interval up to {high:.0%}, Wilson), "
            f"of them {sum(one.seed is not None for one in alarms)} exact compiles with other seeds, and other and fewer texts "
            f"({', '.join(f'{name} {value}' for name, value in FEWER.items())}).",
        ]
    rows = (
        f"{one.fault if one.seed is None else f'none, seed {one.seed}'} | {one.form} | "
        f"{'caught' if one.caught else 'passed'} | {'; '.join(one.reasons).replace('|', '‖')}"
        for one in found
        if one.seed is None or one.caught
    )
    return [*lines, "", *table("fault | artifact | | by", rows)]


RECORD = Record(
    "VERIFIER",
    "Can the verifier fail?",
    "python -m benchmarks.faults",
    prose("faults: setting"),
    Verdict,
)


def main() -> None:
    """Verify what is left."""
    run = prepared(ProgressBars(Console(width=132)))
    RECORD.resume(
        lambda found: verdicts(run, found),
        report,
        lambda one: f"{one.fault} ({one.form}, {one.seconds:.0f} s): {'; '.join(one.reasons) or 'passed'}",
    )


if __name__ == "__main__":
    main()
