"""The benchmarks of size run on a tiny shape, so that they are there on the day that a GPU is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks import gpu, scale


def test_the_gpu_benchmark_runs_every_stage(tmp_path: Path) -> None:
    profile, phases, remarks = gpu.measure(gpu.SHAPES["tiny"], tmp_path, torch.device("cpu"))
    by_name = {phase.label: phase for phase in phases}
    for name in ("extract: activations of all blocks", "closed form", "distill", "verify: states and distributions"):
        assert by_name[name].flops > 1e8
        assert by_name[name].seconds * profile.rate > by_name[name].flops / 2  # no faster than the machine
    assert by_name["one forward pass of the calibration tokens"].tokens == gpu.SHAPES["tiny"].calibration
    found = re.search(r"compiled\) (\S+) of KL\(steered \|\| base\) (\S+) nats", remarks[-1])
    assert found is not None
    assert float(found[1]) < 0.3 * float(found[2])


def test_a_large_merge_is_measured(tmp_path: Path) -> None:
    memory, speed = scale.measure_merge(tmp_path / "merge", 0.002, wide=False)
    assert 0 < float(memory[2].split()[0]) < 2
    assert float(speed[2].split()[0]) > 0
    assert not (tmp_path / "merge").exists()
