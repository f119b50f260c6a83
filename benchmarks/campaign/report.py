"""The page: what was tried, how much of it went right, and everything that did not, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.campaign import disk, trial
from benchmarks.campaign.jobs import Finding
from benchmarks.record import Record, prose, table

RECORD: Record[None] = Record("RELIABILITY", "Never wrong in silence", "make campaign", prose("campaign: setting"))
# The row of the findings: what it says, what was measured when the work began, and the goal.
ROWS = {
    "kills": ("`kill -9` at every write point of a small run and at 100 random moments: finished, byte-identical", "52 of 58", "all"),
    "inputs": (
        "bad inputs: exit code 2 with file and place, no traceback, under 10 s and 2 GiB, nothing left, nothing changed",
        "about 60 %", "all",
    ),
    "silent": ("silent wrong results among them", "25", "0"),
    "processes": ("a sample of them in processes of their own: the same answer as in forks", "", "all"),
    "tampering": ("tampered or stale artifacts: noticed by the command that uses them", "33 of 49", "all but hidden files"),
    "disk": ("full disks, quotas, read-only, folders deleted midway, files in the way: said, and right when run again", "5 of 10", "all"),
    "attacks": ("code run from an artifact, secret sent, file outside read, control codes shown: ways that work", "4", "0"),
    "together": ("two commands in one folder: the second says who holds it, exit code 2", "one silently wins", "all"),
    "soak": ("small runs in one process: flat in memory, files, threads", "20 flat", "200 flat"),
}  # fmt: skip


def lines(found: Sequence[Finding], minutes: float, start: float) -> list[str]:
    """The page below its head."""
    failed = [one for one in found if one.problem]
    inputs = [one for one in found if one.row == "inputs"]
    skipped = sorted({one.name for one in found if one.row == "skipped"})
    slowest = max(inputs, key=lambda finding: finding.seconds)
    largest = max(inputs, key=lambda finding: finding.peak)
    (points,) = (one.name for one in found if one.row == "points")
    text = prose(
        "campaign: how",
        minutes=f"{minutes:.0f}",
        start=f"{start:.0f}",
        points=points,
        slowest=f"{slowest.seconds + start:.1f} s ({slowest.name})",
        largest=f"{largest.peak / trial.GIB:.2f} GiB ({largest.name})",
        sizes=", ".join(f"`{size}`" for size in disk.SIZES),
    )
    head = [*table("what | before | now | goal", _rows(found)), "", text, ""]
    head += [f"Skipped: {name}." for name in skipped]
    if not failed:
        return [*head, "Nothing failed."]
    return [*head, f"## What failed ({len(failed)})", "", *(_line(one) for one in failed)]


def _line(one: Finding) -> str:
    problem = " ".join(one.problem.split())[:200].replace("|", "‖").replace("<", "&lt;").replace("\\", "\\\\")
    return f"- {'**silent** ' if one.silent else ''}{one.row}: {one.name}: {problem}"


def _rows(found: Sequence[Finding]) -> Iterator[tuple[str, ...]]:
    for row, (what, before, goal) in ROWS.items():
        tried = [one for one in found if one.row == ("inputs" if row == "silent" else row)]
        right = sum(not one.problem for one in tried)
        now = f"{right} of {len(tried)}"
        if row == "silent":
            now = str(sum(one.silent for one in tried))
        elif row == "attacks":
            now = f"{len(tried) - right} of {len(tried)} tried"
        elif row == "soak":
            now = f"{right} of {len(tried)} flat ({', '.join(one.name for one in tried)})"
        yield what, before, now if tried else "not run", goal
