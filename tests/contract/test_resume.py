"""What a killed compile left: continued to the same bytes where it fits, discarded with a remark where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from compile_steer.common.progress import Advance, Progress
from compile_steer.lowering import distill
from compile_steer.lowering.job import Lowering, ResumeFiles, SavedState, content_sha256
from compile_steer.lowering.options import CalibrationOptions, CompileOptions, DistillOptions
from compile_steer.models.tokens import Encoded
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from tests.helpers.fitting import TRAINING, canonical_program, job
from tests.helpers.small_run import prepare
from tests.helpers.tiny import intervention, loaded

OPTIONS = DistillOptions(start="random", rank=3, epochs=2, learning_rate=0.1, batch_tokens=64, save_every=2)
TEXTS = TRAINING[:7]


class Notes(Progress):
    """Keeps the remarks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# ------------------------------------------------------------------------------------------ one state


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    notes = Notes()
    saved = SavedState(tmp_path / "work" / "x.pt", "a", notes.note)
    assert saved.load() is None and not notes.notes
    saved.save({"x": torch.ones(2), "losses": [1, 2.5], "norm": float("inf"), "ids": (1, 2)})
    state = saved.load()
    assert torch.equal(state.pop("x"), torch.ones(2))
    assert state == {"losses": [1, 2.5], "norm": float("inf"), "ids": (1, 2)}
    ResumeFiles(tmp_path / "work").clear()
    assert not (tmp_path / "work").exists()
    nowhere = SavedState(None, "", notes.note)
    nowhere.save(1)
    assert nowhere.load() is None and not notes.notes


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit of the tensor, which zip files need not notice."""
    at = content.index(b"\x00\x00\x80\x3f" * 3)
    return content[:at] + b"\x01" + content[at + 1 :]


@pytest.mark.parametrize("spoil", [cut, flip, lambda _c: b"", lambda _c: b"cut", lambda c: c[:-40]])
def test_a_damaged_state_is_discarded_with_a_remark(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    notes = Notes()
    saved = SavedState(tmp_path / "x.pt", "a", notes.note)
    saved.save({"x": torch.ones(3)})
    assert saved.path is not None
    saved.path.write_bytes(spoil(saved.path.read_bytes()))
    assert saved.load() is None
    assert len(notes.notes) == 1 and "begins again" in notes.notes[0]


@pytest.mark.parametrize("content", [[], {}, {"made_from": "a"}, {"made_from": "a", "state": {}, "sha256": ""}, 3])
def test_a_stranger_s_file_is_discarded(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert SavedState(tmp_path / "x.pt", "a", Notes().note).load() is None


def test_everything_that_decides_the_result_is_in_the_hash() -> None:
    text, options = Encoded((1, 2, 3), 2), CalibrationOptions()
    one = torch.tensor([1.0, 2.0])
    values: list[tuple[Any, ...]] = [
        (),
        ([],),
        ([], []),
        ([[]],),
        (one,),
        (one.bfloat16(),),
        (one.reshape(2, 1),),
        (-one,),
        ({"a": one},),
        ({"b": one},),
        ([text],),
        ([replace(text, n_prompt=1)],),
        (options,),
        (options.model_copy(update={"batch": 7}),),
        (1,),
        ("1",),
        (1.0,),
    ]
    hashes = [content_sha256(*value) for value in values]
    assert len(set(hashes)) == len(hashes)
    assert content_sha256({"a": one}) == content_sha256({"a": one.clone()})


# ---------------------------------------------------------------------------------- a training's state


class Stopped(Exception):
    """What a kill is to a test."""


def stop_after(texts: float) -> Advance:
    seen = 0.0

    def advance(done: float) -> None:
        nonlocal seen
        seen += done
        if seen > texts:
            raise Stopped

    return advance


@pytest.fixture(scope="module")
def undisturbed(start: WeightPatch) -> WeightPatch:
    return train(lowering(None), start)


@pytest.fixture(scope="module")
def start() -> WeightPatch:
    return distill.random_patch(loaded("llama").layout, 1, OPTIONS.rank, seed=0)


def lowering(folder: Path | None, notes: Progress | None = None, seed: int = 0, **changes: Any) -> Lowering:
    options = CompileOptions(distill=OPTIONS.model_copy(update=changes))
    steering = canonical_program("llama", intervention())
    made = job(loaded("llama"), steering, options)
    return replace(made, resume=ResumeFiles(folder, "inputs"), progress=notes or Progress(), seed=seed)


def same(a: WeightPatch, b: WeightPatch) -> bool:
    return content_sha256(dict(a.low_rank)) == content_sha256(dict(b.low_rank))


def train(task: Lowering, start: WeightPatch, advance: Advance = lambda _n: None) -> WeightPatch:
    return distill.train_end_to_end(task, TEXTS, start, advance)


def reversed_order(state: dict[str, Any]) -> None:
    """As a file format leaves it that sorts its tensors by name, or another version of the optimizer's groups."""
    for key in ("parameters", "optimizer"):
        state[key] = dict(reversed(state[key].items()))


def test_a_state_is_matched_by_name_whatever_its_order(
    start: WeightPatch, undisturbed: WeightPatch, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(lowering(tmp_path), start, stop_after(1.2 * len(TEXTS)))
    content = torch.load(tmp_path / "distill.pt", weights_only=True)
    assert content["state"]["step"] > 0
    reversed_order(content["state"])
    saved = SavedState(tmp_path / "distill.pt", content["made_from"], Progress().note)
    saved.save(content["state"])
    steps: list[float] = []
    notes = Notes()
    assert same(train(lowering(tmp_path, notes), start, steps.append), undisturbed)
    assert not notes.notes
    assert sum(steps) < 1.5 * len(TEXTS), "it did not begin again"


@pytest.mark.parametrize("other", ["start", "seed", "options", "texts", "shapes"])
def test_a_state_of_anything_else_is_discarded(
    start: WeightPatch, undisturbed: WeightPatch, other: str, tmp_path: Path
) -> None:
    """Each case stopped with one thing different, and goes on without that."""
    before, changes, seed = start, dict[str, Any](), 0
    if other == "start":  # as after a pass over the blocks that was itself begun again
        before = WeightPatch({name: LowRank(edit.B, 1.5 * edit.A) for name, edit in start.low_rank.items()})
    elif other == "seed":
        seed = 1
    elif other == "options":
        changes = {"learning_rate": 0.05}
    stopped = lowering(tmp_path, seed=seed, **changes)
    texts = TEXTS[1:] if other == "texts" else TEXTS
    with pytest.raises(Stopped):
        distill.train_end_to_end(stopped, texts, before, stop_after(1.2 * len(texts)))
    if other == "shapes":
        content = torch.load(tmp_path / "distill.pt", weights_only=True)
        parameters = content["state"]["parameters"]
        parameters.update({name: value[:1] for name, value in parameters.items()})
        SavedState(tmp_path / "distill.pt", content["made_from"], Progress().note).save(content["state"])
    notes = Notes()
    assert same(train(lowering(tmp_path, notes), start), undisturbed)
    assert len(notes.notes) == 1 and "this part begins again" in notes.notes[0]


# ------------------------------------------------------------------------------------- a real kill -9

KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from compile_steer.artifacts import writing
from compile_steer.artifacts.files import sha256
from compile_steer.pipeline.artifacts import compile_program
from tests.helpers.small_run import SmallRun

run = SmallRun(Path(sys.argv[1])).open()
adapter, publish, written = run.paths.adapter("distill"), writing._publish, []

def compiled(fatal):
    # In a fork, which costs no second import; killed when it is about to publish its state number `fatal`.
    def publish_or_die(path):
        if path.suffix == ".pt":
            written.append(path.name)
            (run.paths.out / "written").write_text(json.dumps(written))
            if len(written) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        publish(path)

    child = os.fork()
    if child == 0:
        writing._publish = publish_or_die
        compile_program(run, force=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def weights():
    names = ("adapter_model.safetensors", "adapter_config.json", "training.json")
    found = {name: sha256(adapter / name) for name in names}
    shutil.rmtree(adapter)
    return found

assert compiled(0) == 0
names = json.loads((run.paths.out / "written").read_text())
expected, ends = weights(), {}
# Where the texts are there, where a block is solved, at the start and amid the training end to end.
blocks, steps = names.index("distill block by block.pt"), names.index("distill.pt")
kills = [blocks + 1, blocks + 2, steps + 1, len(names) - 1]
for kill in kills:
    assert os.WTERMSIG(compiled(kill)) == 9
    if kill == kills[-1]:
        assert os.WTERMSIG(compiled(2)) == 9
    assert compiled(0) == 0
    ends[f"{kill} of {len(names)}: {names[kill - 1]}"] = weights() == expected
print(json.dumps(ends), *[path.name for path in run.paths.out.rglob(".writing-*")], (run.paths.out / "work").exists())
"""


def test_a_distill_that_was_killed_anywhere_ends_in_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    yaml = YAML()
    recipe = yaml.load(run.recipe)
    recipe["compile"] = {
        "dial": True,  # linear edits leave something to train for
        "backends": ["distill"],
        "calibration": {"prompts": 6, "max_new_tokens": 4},
        "distill": {"prompts": 6, "epochs": 2, "block_steps": 3, "save_every": 1, "rank": 4, "batch_tokens": 64},
    }
    yaml.dump(recipe, run.recipe)
    run.open().validate()
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has no other
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    ends, *rest = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert rest == ["False"], "the states and temporaries are gone"
    outcomes = json.loads(ends)
    assert {name.partition(": ")[2] for name in outcomes} == {"distill block by block.pt", "distill.pt"}
    assert all(outcomes.values()), outcomes
