"""Two processes, each with half of the texts, solve what one process solves with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compile_steer.common import distributed
from compile_steer.common.errors import RecipeError
from compile_steer.lowering.closed_form import Stage
from compile_steer.steering.patch import WeightPatch
from tests.helpers.fitting import CALIBRATION, canonical_program, solve
from tests.helpers.tiny import intervention, loaded

ROOT = Path(__file__).resolve().parents[2]
STAGES = [Stage(1, "mlp", 3), Stage(2, "attn", 2)]


def solved() -> WeightPatch:
    steering = canonical_program("granite", intervention("ablate", "mlp_out", 1))
    return solve(loaded("granite"), steering, STAGES, distributed.share(CALIBRATION))


def test_two_processes_solve_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.contract.test_processes", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = solved().low_rank
    for rank in (0, 1):
        actual = load_file(tmp_path / f"{rank}.safetensors")
        assert actual.keys() == expected.keys()
        for name, edit in expected.items():
            delta = edit.B @ edit.A
            assert torch.allclose(actual[name], delta, atol=2e-3 * float(delta.abs().max()))


def test_what_one_process_alone_can_do_is_refused_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.require_alone("merging")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="merging runs in one process; start it without torchrun"):
        distributed.require_alone("merging")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join()
    deltas = {name: (edit.B @ edit.A).contiguous() for name, edit in solved().low_rank.items()}
    save_file(deltas, str(Path(sys.argv[1]) / f"{distributed.rank()}.safetensors"))
    distributed.leave()
