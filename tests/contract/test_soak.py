"""Several small runs in one process leave nothing behind: no model, tensor, hook, thread, open file or temporary file."""

from __future__ import annotations

import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_steer as cs
from compile_steer.artifacts.locks import locked
from compile_steer.models.text import Text
from tests.helpers import tiny
from tests.helpers.small_run import SETTINGS, words

SCORE = SETTINGS["validate"]["score"]
NOT_OPTIONS = ("score", "other_behaviour")  # the recipe's own keys
VALIDATE: dict[str, Any] = {
    **{key: value for key, value in SETTINGS["validate"].items() if key not in NOT_OPTIONS},
    "random_directions": 20,
    "max_repetition": 0.99,
}
VERIFY: dict[str, Any] = {"long": 0, "capability": 2, "max_new_tokens": 4, "free_tokens": 4}


def count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def state(folder: Path) -> dict[str, int]:
    gc.collect()
    live = gc.get_objects()
    return {
        "models": sum(type(item).__name__ == "LlamaForCausalLM" for item in live),
        "tensors": sum(issubclass(type(item), torch.Tensor) for item in live),
        "threads": threading.active_count(),
        "kernel threads": count(Path("/proc/self/task")),
        "open files": count(Path("/proc/self/fd")),
        "temporaries": sum(path.name.startswith(".") for path in folder.rglob("*")),
        "system temporaries": count(Path(tempfile.gettempdir())),
    }


def small_run(model_folder: Path, out: Path, seed: int) -> None:
    pairs = cs.Pairs.from_list(
        (words(n, 4), words(n + 500, 6, start=70), words(n + 900, 6, stop=79)) for n in range(24)
    )
    neutral = [Text(words(n + 50, 4), words(n + 80, 6)) for n in range(6)]
    prompts = [words(n + 2000, 4) for n in range(20)]
    data = pairs.to_behaviour(neutral=neutral, heldout=prompts[:6], calibration=prompts[6:])
    model = cs.load(str(model_folder), device="cpu")
    directions = cs.extract(model, data, shuffled=5, seed=seed)
    program = cs.validate(model, data, directions, SCORE, seed=seed, **VALIDATE).program
    with locked(out):
        compiled = cs.compile(model, program, data.calibration, backend="closed_form", seed=seed)
        folder = compiled.save(out / "adapter")
        cs.merge(compiled, out / "merged", "fp32")
        cs.verify(model, program, folder, data, SCORE, seed=seed, **VERIFY)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_runs_in_one_process_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model = tmp_path / "model"
    tiny.build("llama", seed=3).save_pretrained(model)
    tiny.chat_tokenizer().save_pretrained(model)
    states = []
    for seed in range(3):
        small_run(model, tmp_path / "out", seed)
        states.append(state(tmp_path))
    # The first may fill caches that belong to the process.
    assert states[1] == states[2]
