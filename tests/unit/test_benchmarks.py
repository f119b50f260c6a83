"""Every benchmark can be imported, and writes its page from what it finds."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import benchmarks
import benchmarks.seeds
from benchmarks import __main__ as ocean_targets
from benchmarks import calibration, engines, faults, interop, programs, sweep, teacher, verdicts
from benchmarks.faults import FAULTS, Verdict
from benchmarks.record import Record, prose, sections, table
from benchmarks.seeds import __main__ as seeds
from benchmarks.seeds import c, d, e
from benchmarks.seeds.readings import Reading
from benchmarks.trials import Compiled, Trial
from compile_steer.artifacts.provenance import EngineRecord
from tests.helpers.verification import VerifierCase

MODULES = [
    module.name
    for package in (benchmarks, benchmarks.seeds)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]


@dataclass(frozen=True)
class Number:
    value: int


@pytest.mark.parametrize("module", MODULES)
def test_benchmark_can_be_imported(module: str) -> None:
    importlib.import_module(module)


def test_record_keeps_findings_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    record = Record("NUMBERS", "Numbers", "python -m numbers", "Whole ones.", Number, tmp_path)

    def report(found: list[Number]) -> list[str]:
        return table("number | twice", ((one.value, 2 * one.value) for one in found))

    record.resume(lambda _found: iter([Number(1), Number(2)]), report, str)
    assert record.findings() == [Number(1), Number(2)]
    record.resume(lambda found: iter([Number(3)] if len(found) == 2 else []), report, str)
    text = record.path.read_text(encoding="utf-8")
    assert text.startswith("# Numbers\n\nWritten by `python -m numbers`; do not edit.") and "[numbers.jsonl]" in text
    assert text.endswith("Whole ones.\n\n| number | twice |\n|---|---|\n| 1 | 2 |\n| 2 | 4 |\n| 3 | 6 |\n")


def test_record_replaces_one_section_and_keeps_the_others(tmp_path: Path) -> None:
    record = Record[None]("PARTS", "Parts", "python -m parts", folder=tmp_path)
    for heading, text in (("A. First", "old"), ("B. Second", "stays"), ("A. First", "new")):
        record.save_section(heading, [text, ""])
    assert sections(record.path) == {"A. First": "new", "B. Second": "stays"}
    assert record.path.read_text(encoding="utf-8").endswith(
        "do not edit.\n\n## A. First\n\nnew\n\n## B. Second\n\nstays\n"
    )


def test_page_of_the_ocean_targets(tmp_path: Path) -> None:
    case = VerifierCase.of(tmp_path)
    parity = case.parity_of(case.merged())
    rows = [("`bias`: top-1", "99.9 %", "", "100 %")]
    lines = ocean_targets.report(rows, [parity, replace(parity, passed=False, reasons=["KL"])], 1234, "f" * 64)
    assert "| `bias`: top-1 | 99.9 % |  | 100 % |" in lines and "Calibration: 1234 tokens" in lines[0]
    assert lines[-2].startswith("| bias merged-fp32 | ") and lines[-1].endswith("| FAILED: KL |")


def test_page_of_the_programs_keeps_what_was_measured(tmp_path: Path) -> None:
    page = programs.Page.read()
    own = page.ours[programs.SMOLLM2.title]
    assert own.keys() == set(programs.NAMES), "docs/PROGRAMS.md"
    assert replace(programs.RECORD, folder=tmp_path).save(*page.report()) == programs.RECORD.path.read_text("utf-8")


def test_page_of_the_trials_counts_by_kind_of_direction() -> None:
    trials = [
        Trial("ocean", "real", 0, "pass", "p = 0.01", 9.0, 10, 2.5, 0.4, 0.3, compiled=Compiled(0.01, 0.39, 0.3)),
        Trial("ocean", "random", 0, "fail", "chance", 9.0, 10, 2.5, score=-0.1, compiled=Compiled(0.02, 0.0, 0.01)),
        Trial("king", "real", 0, "no pairs", "too few", 0.0),
    ]
    lines = calibration.report(trials)
    assert any(line.startswith("| real | 1 of 1") for line in lines)
    assert any(line.startswith("| random or from shuffled labels | 0 of 1") for line in lines)
    assert any("too rarely when it is asked: king" in line for line in lines)
    assert any(line.startswith("| ocean | real | pass | +0.400 | +0.390 | 0.97 |") for line in lines)


def test_page_of_the_faults_counts_what_was_caught() -> None:
    found = [
        Verdict("none", "adapter", False, [], 1.0),
        Verdict("emptied", "adapter", True, ["KL(a||b)", "top-1"], 1.0),
        Verdict("late", "merged-fp32", False, [], 1.0),
        Verdict("none", "merged-fp32", False, [], 1.0, seed=4),
    ]
    text = "\n".join(faults.report(found))
    assert "Caught: 1 of 2 faults. Missed: late (merged-fp32)." in text
    assert "False alarms: 0 of 2 artifacts" in text and "of them 1 exact compiles" in text
    assert "| emptied | adapter | caught | KL(a‖‖b); top-1 |" in text and "seed 4" not in text
    assert "0 of them only by" in text
    small = Verdict("small", "adapter", True, [f"{faults.OF_THE_FILE}: 2e-4"], 1.0)
    both = Verdict("large", "adapter", True, [*small.reasons, "top-1"], 1.0)
    assert "1 of them only by" in "\n".join(faults.report([small, both]))
    alarm = Verdict("none", "merged-fp32", True, ["top-1"], 1.0, seed=5)
    assert "| none, seed 5 | merged-fp32 | caught | top-1 |" in "\n".join(faults.report([*found, alarm]))
    assert len({(one.name, one.form) for one in FAULTS}) == len(FAULTS) >= 15


def test_page_of_the_engines_compares_every_form_with_the_base() -> None:
    reading = EngineRecord("vllm", "adapter", 90, 1e-5, 2e-6, 1e-5, 2e-6, 0.5, 1.0)
    refused = EngineRecord("vllm", "exact bias", problem="has no place for a bias.")
    times = {"base": [10.0, 11.0, 12.0], "adapter": [5.0, 5.5, 6.0]}
    found = [engines.Finding("vllm", "f32", one) for one in (reading, refused)]
    assert engines.report(found)[-1].startswith("Not measured yet")
    lines = engines.report([*found, engines.Finding("vllm", engines.SPEED, times=times)])
    assert any(line.startswith("| vllm, f32 | adapter | 1.0e-05 |") and line.endswith("| same |") for line in lines)
    assert "| vllm, f32 | exact bias |  |  |  |  |  |  | refused |" in lines
    assert "- vllm, exact bias: has no place for a bias." in lines
    assert lines[-1] == "| vllm | adapter | 5.5 | 0.500 [0.500, 0.500] |"


def test_page_of_the_other_tools_has_a_row_for_each_comparison() -> None:
    lines = interop.report([interop.Row("theirs", 1e-6, 0.25), interop.Row("ours", 2e-6)], "repeng 0.5")
    assert lines[-2:] == ["| theirs | 1.0e-06 | 0.25 |", "| ours | 2.0e-06 |  |"]


def test_page_of_the_sweep_has_the_ratio_and_the_largest_difference() -> None:
    plain = sweep.Condition(lambda: lambda _layer: {}, {(1, 2.0): (0.5, 1.2), (1, 3.0): (0.6, 1.5)}, 10.0)
    ours = sweep.Condition(lambda: lambda _layer: {}, {(1, 2.0): (0.51, 1.2)}, 2.0)
    lines = sweep.cost_table({"plain loop": plain, "ours": ours})
    assert lines[-1] == "| ours | 2 | 1 of 2 | 5.0 | 1.0e-02 |"


def test_page_of_the_teachers_has_the_ratio_of_the_first_two() -> None:
    costs = [
        teacher.Cost(seconds, 1000, 500.0, peak) for seconds, peak in ((10.0, 1000.0), (20.0, 2000.0), (30.0, 1500.0))
    ]
    assert teacher.report(costs)[-1].endswith("| 2.00 | 0.50 |  |")


def reading(effect: float) -> Reading:
    return Reading(np.full(4, effect), np.array([0.0, 1.0]), 1.2, 0.1, 0.9, "By the sea.")


def test_section_of_seed_d_has_a_row_for_each_coefficient() -> None:
    real = [reading(0.1 * c) for c in d.COEFFICIENTS]
    random = [reading(0.0) for _c in d.RANDOM_COEFFICIENTS]
    lines = d.report("What are you?", real, random, reading(0.2), reading(0.3), 0.5, 3)
    assert sum("By the sea." in line for line in lines) == len(d.COEFFICIENTS) + len(d.RANDOM_COEFFICIENTS) + 2
    assert lines[-1].startswith("The same coefficient over prompts") and "is 0.100" in lines[-1]


def test_figure_of_seed_d_is_drawn(tmp_path: Path) -> None:
    d.draw({"ocean": (d.COEFFICIENTS, [reading(0.1 * c) for c in d.COEFFICIENTS])}, 0.5, tmp_path / "d.svg")
    assert "<svg" in (tmp_path / "d.svg").read_text(encoding="utf-8")


def test_section_of_seed_e_names_what_beats_base_and_controls() -> None:
    bases = [e.Base(0.5, 0.5, 0.7), e.Base(0.51, 0.5, 0.6)]
    outcomes = {name: [e.Outcome(0.5, 0.5, 8, 1.0), e.Outcome(0.51, 0.5, 12, 1.0)] for name in e.CONDITIONS}
    outcomes["PASf"] = [e.Outcome(0.9, 0.9, 8, 1.0), e.Outcome(0.92, 0.9, 8, 4.0)]
    lines = e.report(outcomes, bases, 50)
    assert lines[-1] == (
        "Above the base with an interval that leaves out 0: PASf. Of these also above the better of the two controls of "
        "the same split: PASf."
    )
    assert any(line.startswith("| PASf | 0.910 | +0.405 [") for line in lines)


def test_compiled_artifacts_of_seed_c_have_a_row_each(tmp_path: Path) -> None:
    case = VerifierCase.of(tmp_path)
    assert c.compiled([case.parity_of(case.merged())])[-1].startswith("| bias merged-fp32 | ")


@pytest.mark.parametrize("name", seeds.NAMES)
def test_every_seed_has_a_checklist(name: str) -> None:
    (_title, _blank, items) = seeds.checklist(name)
    assert all(line.startswith(("- [x] ", "- [ ] ")) for line in items.splitlines()) and "- [x] " in items


def test_every_text_that_a_benchmark_asks_for_is_written() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(benchmarks.__path__[0]).rglob("*.py"))
    written = sections(Path(benchmarks.__path__[0]) / "prose.md")
    asked = set(re.findall(r'prose\(\s*"([^"]+)"', sources)) | {f"sweep: {name}" for name in sweep.PARTS}
    asked |= {subject.prose for subject in programs.SUBJECTS} | {f"verdicts: {name}" for name in verdicts.VERDICTS}
    assert asked == set(written)
    assert all(prose(f"sweep: {name}", **sweep.GAPS) for name in sweep.PARTS)
