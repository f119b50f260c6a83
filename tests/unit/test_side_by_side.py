"""The engine of chat and playground: three models from disk, one prompt, and how far they are apart token by token."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compile_steer.__main__ import main
from compile_steer.artifacts.provenance import PARITY, Provenance, weights_sha256
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.models.generate import continue_prompts
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.tools.playground import PORTS, require_free, require_gradio
from compile_steer.tools.side_by_side import SIDES, Member, Side, SideBySide, choose_artifact
from compile_steer.verification.parity import AdapterScale, Parity, own_parity
from tests.helpers.small_run import SmallRun

ASK = Text("w42 w43")


@pytest.fixture(scope="module")
def models(original: SmallRun) -> SideBySide:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(original.root)
        return SideBySide.open([Member.read(original.paths.adapter("closed_form"))])


def last(models: SideBySide, side: Side, strength: float = 1.0, tokens: int = 9) -> tuple[int, ...]:
    *_, answer = models.answer(side, ASK, [strength], tokens)
    return answer.ids


def without_effect(folder: Path) -> None:
    """Take the adapter's effect away, as a fault of the compiler would, and make every record fit."""
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    Provenance.read(folder).write(folder)
    parity = Parity.load(folder / PARITY)
    replace(parity, sha256={**parity.sha256, "artifact": weights_sha256(folder)}).save(folder / PARITY)
    assert own_parity(folder) is not None


def test_answers_in_steps_are_those_that_are_generated_at_once(models: SideBySide) -> None:
    (member,) = models.members
    alone = reload(member.folder, models.base)
    cases = ((models.base, None), (models.base, member.program), (alone, None))
    for side, (loaded, program) in zip(SIDES, cases, strict=True):
        (expected,) = continue_prompts(loaded, [ASK], program, max_new_tokens=9)
        assert last(models, side) == expected.ids
    assert last(models, "base") != last(models, "steered")


def test_answers_grow_in_turn_without_touching_each_other(models: SideBySide) -> None:
    growing = [models.answer(side, ASK, [1.0], 9) for side in SIDES]
    together = [list(parts)[-1].ids for parts in zip(*growing, strict=False)]
    assert len(together) == 3  # 4, 8 and 9 tokens
    growing = [models.answer(side, ASK, [1.0], 9) for side in SIDES]
    *_, ends = zip(*growing, strict=False)
    assert [end.ids for end in ends] == [last(models, side) for side in SIDES]


def test_strength_turns_the_hooks_and_the_adapter(models: SideBySide) -> None:
    assert last(models, "steered", 0.0) == last(models, "compiled", 0.0) == last(models, "base", 5.0)
    *_, answer = models.answer("steered", ASK, [1.0], 9)
    weak, strong = models.compare(answer, [0.5]), models.compare(answer, [2.0])
    assert weak.base.mean() < strong.base.mean()
    assert weak.limit is None
    assert models.compare(answer, [0.0]).compiled.max() == 0
    unverified = replace(models, members=tuple(replace(member, parity=None) for member in models.members))
    assert "not checked: it has no parity report" in str(unverified.compare(answer, [1.0]))


@pytest.mark.parametrize(
    ("left", "note"),
    [(0.1, "the gates are of strength 1"), (9.0, "it is for scale 1 alone (x-1 remaining KL 900.00%)")],
)
def test_at_another_strength_no_gate_holds_and_an_adapter_may_not_follow(
    models: SideBySide, left: float, note: str
) -> None:
    (member,) = models.members
    assert member.parity is not None and member.parity.adapter is not None
    controls = replace(member.parity.adapter, scales=[AdapterScale(-1.0, 1.0, left)])
    changed = replace(models, members=(replace(member, parity=replace(member.parity, adapter=controls)),))
    *_, answer = models.answer("steered", ASK, [1.0], 9)
    assert f"not checked: {note}" in str(changed.compare(answer, [0.5]))


def test_divergences_are_those_of_the_verifier(models: SideBySide, original: SmallRun) -> None:
    *_, answer = models.answer("steered", ASK, [1.0], 9)
    found = models.compare(answer, [1.0])
    assert found.compiled.shape == found.base.shape == (len(answer.ids) - answer.n_prompt,)
    assert found.limit == pytest.approx(0.02 * float(found.base.mean()))
    assert 0 < float(found.compiled.mean()) < float(found.base.mean())


def test_a_run_gives_the_artifact_to_ship(original: SmallRun, run: SmallRun) -> None:
    merged, adapter = original.paths.merged("bias", "fp32"), original.paths.adapter("closed_form")
    chosen = choose_artifact(original.paths.out)
    assert chosen == merged  # it is exact
    assert Parity.load(chosen / PARITY).passed
    assert choose_artifact(original.paths.out, Path(adapter.name)) == adapter
    assert choose_artifact(original.paths.out, adapter) == adapter
    assert choose_artifact(adapter) == adapter
    with pytest.raises(ArtifactError, match="has none of that name"):
        choose_artifact(original.paths.out, Path("nothing"))
    for folder in (run.paths.adapter("closed_form"), run.paths.merged("bias", "fp32")):
        (folder / PARITY).unlink()
    with pytest.raises(ArtifactError, match="not verified yet.*compile-steer run recipes/tide.yaml --out"):
        choose_artifact(run.paths.out)
    shutil.rmtree(run.paths.out / "adapters")
    shutil.rmtree(run.paths.out / "merged")
    with pytest.raises(ArtifactError, match="nothing is compiled yet"):
        choose_artifact(run.paths.out)
    run.paths.validation.unlink()
    with pytest.raises(ArtifactError, match="not validated yet"):
        choose_artifact(run.paths.out)


def test_what_cannot_be_loaded_or_compared_is_refused(models: SideBySide, run: SmallRun) -> None:
    with pytest.raises(ArtifactError, match="holds a patch"):
        Member.read(run.paths.adapter("bias"))
    adapter = run.paths.adapter("closed_form")
    merged, own = Member.read(run.paths.merged("bias", "fp32")), Member.read(adapter)
    with pytest.raises(RecipeError, match="only adapters can be on at once"):
        SideBySide.open([merged, own])
    for text in (" \n", "w7 \ud800"):
        with pytest.raises(RecipeError):
            models.encode("base", Text(text))
    run.paths.program.rename(run.paths.program.with_name("elsewhere.safetensors"))
    with pytest.raises(ArtifactError, match=r"--program"):
        Member.read(adapter)
    assert Member.read(adapter, run.paths.program.with_name("elsewhere.safetensors")).program.sha256
    without_effect(adapter)
    assert last(SideBySide.open([own]), "compiled") == last(models, "base")  # nothing but the files was read


def test_several_programs_are_on_at_once_each_at_its_strength(models: SideBySide) -> None:
    (member,) = models.members
    both = SideBySide.on(models.base, [member, replace(member, name="again")])
    for side in SIDES:
        for strengths in ([1.0, 0.0], [0.0, 1.0]):
            *_, answer = both.answer(side, ASK, strengths, 9)
            assert answer.ids == last(models, side)
    *_, twice = both.answer("steered", ASK, [0.5, 1.5], 9)
    assert twice.ids == last(models, "steered", 2.0)
    assert "each program alone" in str(both.compare(twice, [0.5, 1.5]))


def test_the_playground_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"port {port} of 127.0.0.1 cannot be used .*--port"):
            require_free(port)
        assert require_free(None) in PORTS
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"pip install 'compile-steer\[play\]'"):
        require_gradio()


def test_one_question_ends_with_the_verdict(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run.paths.adapter("closed_form")
    without_effect(adapter)
    command = ["compile-steer", "chat", str(adapter), "--ask", ASK.prompt, "--max-new-tokens", "6"]
    for artifact, code, verdict in ((adapter, 1, "FAIL"), (run.paths.merged("bias", "fp32"), 0, "PASS")):
        command[2] = str(artifact)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        lines = capsys.readouterr().out.strip().splitlines()
        assert ended.value.code == code
        assert [line.split()[0] for line in lines] == ["base", "steered", "compiled", "Compiled"]
        assert f": {verdict}. KL a token" in lines[-1]
    monkeypatch.setattr(sys, "argv", [*command, "--quiet"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("Compiled misses")
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit):
        main()
    result = json.loads(capsys.readouterr().out)
    assert result["passed"]
    assert result["answers"]["steered"] == result["answers"]["compiled"]
