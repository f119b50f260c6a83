"""The short form of the campaign: kills, bad inputs, tampering, full disks, attacks, two runs at once, a soak."""

from __future__ import annotations

import subprocess
import sys

from tests.end_to_end.conftest import ROOT


def test_nothing_of_the_campaigns_sample_fails() -> None:
    # A process of its own: the campaign forks, which a process with threads must not.
    command = [sys.executable, "-m", "benchmarks.campaign", "--short"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
