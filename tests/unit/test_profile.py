"""--profile: what each phase took is measured, and adds up."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from compile_steer.cli.options import Session
from compile_steer.common.profile import Profile
from compile_steer.common.progress import Progress
from tests.helpers.small_run import prepare
from tests.helpers.tiny import loaded


def test_phases_have_their_own_time_arithmetic_tokens_and_memory() -> None:
    tiny, profile = loaded("gpt2"), Profile(Progress(), "cpu", "float32")
    with profile.phase("outer", 1):
        time.sleep(0.05)
        with profile.phase("inner", 1):
            a = torch.ones(30, 40) @ torch.ones(40, 50)
            held = torch.ones(2**26)  # 256 MiB
            time.sleep(0.1)
            del held
        assert a[0, 0] == 40
    with profile.phase("model", 1):
        tiny.model(input_ids=torch.full((3, 7), 5))
    phases = {phase.label: phase for phase in profile.close()}
    assert phases["inner"].flops == 2 * 30 * 40 * 50
    assert (phases["outer"].flops, phases["outer"].tokens) == (0, 0)
    assert phases["outer"].seconds == pytest.approx(0.05, abs=0.04)
    assert phases["inner"].seconds > 0.1
    assert phases["inner"].peak_bytes - phases["outer"].peak_bytes > 150 * 2**20
    assert phases["model"].tokens == 3 * 7  # not those of the table of positions
    weights = sum(p.numel() for name, p in tiny.model.named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert 1 < phases["model"].flops / (2 * 3 * 7 * weights) < 1.2  # and attention
    content = profile.record()
    inner, outer, model = content["traceEvents"]
    assert (inner["name"], outer["name"], model["name"]) == ("inner", "outer", "model")
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert content["matmul_flops"] > 1e8


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_writes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    session = Session(recipe=prepare(tmp_path).recipe)
    profile = Profile(Progress(), "cpu", "float32")
    with profile.phase("a phase", 1):
        pass
    session._profiled = profile, tmp_path / "profile.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    session.finish(None)
    assert (tmp_path / "profile.json").exists() == (rank == 0)
    if rank == 0:
        written = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
        assert [phase["label"] for phase in written["phases"]] == ["between phases", "a phase"]
