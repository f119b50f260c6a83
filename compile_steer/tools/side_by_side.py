"""Base, steered and compiled model side by side: load the three, answer a prompt, compare what they compute token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from compile_steer.artifacts.paths import RunPaths, real_path
from compile_steer.artifacts.provenance import PARITY, PROVENANCE, Provenance
from compile_steer.common.errors import ArtifactError, RecipeError, brief, shell_word
from compile_steer.common.figures import decisive
from compile_steer.models.generate import response_text, stream_answer
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload, reload_adapters, set_adapter_scales
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.pipeline.run import load_base
from compile_steer.recipe import Recipe
from compile_steer.report.recommendation import recommend
from compile_steer.steering.program import Program
from compile_steer.tools.lineage import artifact_root, recipe_folder
from compile_steer.tools.reproduce import require_model_in_use
from compile_steer.verification.gates import kl_limit
from compile_steer.verification.parity import Parity, own_parity

Side = Literal["base", "steered", "compiled"]
SIDES: tuple[Side, ...] = ("base", "steered", "compiled")


@dataclass(frozen=True)
class Member:
    """An artifact, the program that it was compiled from, and its parity report if it has one of its own."""

    name: str
    folder: Path
    provenance: Provenance
    program: Program
    parity: Parity | None

    @staticmethod
    def read(folder: Path, program: Path | None = None) -> Member:
        """Raises `ArtifactError` for a folder that was edited, cannot be loaded, or has its program elsewhere.

        Args:
            program: the file of the program; None: where the artifact's run left it.
        """
        provenance = Provenance.read_unedited(folder)
        if provenance.form == "patch":
            raise ArtifactError(
                f"{folder} holds a patch, which stock libraries do not load. Name what was merged from it (below merged/), or "
                "run 'compile-steer merge' first."
            )
        place = program or RunPaths.of_artifact(folder, provenance.name).program.with_name(
            Path(provenance.program).name
        )
        if not place.is_file():
            raise ArtifactError(f"the program of {folder} is not at {place}: name its file (--program).")
        steering = Program.load(place)
        if steering.sha256 != provenance.program_sha256:
            raise ArtifactError(f"{folder} was compiled from another program than {place} (--program names another).")
        return Member(provenance.name, folder, provenance, steering, own_parity(folder))


def choose_artifact(path: Path, named: Path | None = None, *, adapter: bool = False) -> Path:
    """The folder of the artifact that `path` is, or of the one to ship among those of the run whose folder it is.

    Args:
        named: another of the run's artifacts, by its path or its name.
        adapter: choose among the run's adapters alone.

    Raises:
        ArtifactError: there is none; of a run that is not finished it says which stage is missing.
    """
    path = artifact_root(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder. Needed: that of a run (runs/NAME) or of an artifact.")
    if named is not None:
        places = [named, *(path / kind / named for kind in ("adapters", "merged", "composed", "."))]
        folders = [place for place in places if (place / PROVENANCE).is_file()]
        if not folders:
            raise ArtifactError(f"--artifact: {named} is no artifact, and {path} has none of that name.")
        return folders[0]
    if (path / PROVENANCE).is_file():
        return path
    artifacts = artifacts_of(path)
    if not artifacts:
        raise ArtifactError(f"{path}: {_missing_stage(path)}")
    if adapter and not (artifacts := {f: p for f, p in artifacts.items() if p.form == "adapter"}):
        raise ArtifactError(f"{path} has no verified adapter: several programs at once need one of each.")
    names = {Provenance.read(folder).name for folder in artifacts}
    if len(names) > 1:
        raise ArtifactError(
            f"{path} holds artifacts of several programs ({', '.join(sorted(names))}); name one of them."
        )
    best = recommend(list(artifacts.values()), list(artifacts))
    if best.folder is None:
        raise ArtifactError(
            f"{path}: {best.reason}. --artifact names one all the same: {', '.join(map(str, artifacts))}."
        )
    return best.folder


def artifacts_of(run: Path) -> dict[Path, Parity]:
    """The verified artifacts of the run whose folder it is, with their reports."""
    folders = sorted(path.parent for kind in ("adapters", "merged") for path in (run / kind).glob(f"*/{PARITY}"))
    return {folder: Parity.load(folder / PARITY) for folder in folders if (folder / PROVENANCE).is_file()}


def _missing_stage(run: Path) -> str:
    """What a run without verified artifacts has not done yet, and the command that goes on."""
    if any(run.glob(f"*/*/{PROVENANCE}")):
        missing = "what was compiled is not verified yet"
    elif any(run.glob("vectors/*.validation.json")):
        missing = "nothing is compiled yet"
    elif any(run.glob("vectors/*.directions.safetensors")):
        missing = "the directions are not validated yet"
    else:
        return "neither an artifact nor a run's folder. Make one with 'compile-steer run RECIPE'."
    recipe = Path("recipes", f"{real_path(run).name}.yaml")
    word = shell_word(recipe) if recipe.is_file() else "RECIPE"
    return f"{missing}. The run goes on with: compile-steer run {word} --out {shell_word(run)}"


@dataclass(frozen=True)
class AnswerDivergence:
    """KL of each token of one answer, [n_tokens] in nats."""

    compiled: Tensor  # KL(steered||compiled)
    base: Tensor  # KL(steered||base)
    limit: float | None  # the recorded gate: the largest mean of the first, given the mean of the second
    note: str  # what the artifact's report has measured on many texts, or why there is no limit here

    @property
    def passed(self) -> bool:
        """False where the answer misses the recorded gate; NaN misses it."""
        return self.limit is None or float(self.compiled.mean()) <= self.limit

    def __str__(self) -> str:
        kl, kl_base = float(self.compiled.mean()), float(self.base.mean())
        missed = kl / kl_base if kl_base else 0.0
        if self.limit is None:
            shown, verdict = f"{missed:.2%}", f"(not checked: {self.note})"
        else:
            shown, most = decisive(missed, self.limit / kl_base if kl_base else 0.0, ".2%")
            verdict = f"(at most {most}; {self.note}): {'PASS' if self.passed else 'FAIL'}"
        figures = f"KL a token: steered||compiled {kl:.1e}, steered||base {kl_base:.2f} nats"
        return f"Compiled misses {shown} of what steering changes in this answer {verdict}. {figures}"


@dataclass(frozen=True)
class SideBySide:
    """Three models that answer the same prompts, the base loaded once.

    The compiled one is read from the files on disk by the readers that verification uses. Of adapters several can be on at
    once, each at its own strength; a merged checkpoint stands alone and has the strength that it was compiled with.
    """

    base: LoadedModel
    members: tuple[Member, ...]
    compiled: LoadedModel

    @staticmethod
    def open(
        members: Sequence[Member], *, model: str | None = None, device: str | None = None, dtype: str | None = None
    ) -> SideBySide:
        """Load the members' common base, and what was compiled for it.

        Args:
            model, device, dtype: other ones than the first member's recipe names.

        Raises:
            ArtifactError: a member is damaged, or of another base. RecipeError: the base cannot be loaded.
        """
        return SideBySide.on(_load_base(members[0], model, device, dtype), members)

    @staticmethod
    def on(base: LoadedModel, members: Sequence[Member]) -> SideBySide:
        """The same on a base that is loaded already."""
        for member in members:
            Provenance.read_unedited(member.folder, (base.id, base.revision))
            base.layout.require_program(member.program, base.id, base.revision)
        if all(member.provenance.form == "adapter" for member in members):
            # Not by the recipes' names: PEFT takes no dot in one.
            folders = {f"member{n}": member.folder for n, member in enumerate(members)}
            return SideBySide(base, tuple(members), reload_adapters(folders, base))
        if len(members) > 1:
            merged = ", ".join(str(m.folder) for m in members if m.provenance.form != "adapter")
            raise RecipeError(f"only adapters can be on at once; {merged} is a whole model. Name the run's adapter.")
        return SideBySide(base, tuple(members), reload(members[0].folder, base))

    @property
    def scalable(self) -> bool:
        """True if the compiled model follows the strength: an adapter has a scale, a merged checkpoint none."""
        return all(member.provenance.form == "adapter" for member in self.members)

    def model(self, side: Side, strengths: Sequence[float]) -> tuple[LoadedModel, Program | None]:
        """The model of that side with every member at its strength, until the next call, and the hooks to run it with."""
        if side == "steered":
            programs = [m.program.scaled(strength) for m, strength in zip(self.members, strengths, strict=True)]
            return self.base, sum(programs[1:], programs[0])
        if side == "compiled" and not self.scalable:
            return self.compiled, None
        scales = {f"member{n}": strength for n, strength in enumerate(strengths) if strength}
        if side == "base" or not scales:
            return self.base, None
        set_adapter_scales(self.compiled, scales)
        return self.compiled, None

    def encode(self, side: Side, text: Text) -> Encoded:
        """The prompt as that model's own tokenizer reads it; raises `RecipeError` for one that cannot be given to it."""
        if not text.prompt.strip():
            raise RecipeError("the prompt is empty.")
        try:
            text.prompt.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"the prompt {brief(text.prompt)} is not UTF-8 text.") from error
        return encode((self.compiled if side == "compiled" else self.base).tokenizer, text)

    def answer(self, side: Side, text: Text, strengths: Sequence[float], max_new_tokens: int) -> Iterator[Encoded]:
        """Yield the prompt with that model's greedy answer as it grows; raises `RecipeError` as `encode` and for too long ones."""
        loaded, program = self.model(side, strengths)
        yield from stream_answer(loaded, self.encode(side, text), program, max_new_tokens=max_new_tokens)

    def text(self, side: Side, answer: Encoded) -> str:
        """The answer as text."""
        return response_text(self.compiled if side == "compiled" else self.base, answer)

    def token_kl(self, answer: Encoded, side: Side, strengths: Sequence[float]) -> Tensor:
        """KL(steered||that model) at each token of an answer that any of the three gave, [n_tokens] in nats."""
        n = len(answer.ids) - answer.n_prompt
        pair = []
        for which in ("steered", side):
            loaded, program = self.model(which, strengths)
            # Earlier turns' answers come first.
            pair += [loaded.model, final_states(loaded, [answer], program).response[-n:]]
        return divergence(*pair).kl

    def compare(self, answer: Encoded, strengths: Sequence[float]) -> AnswerDivergence:
        """The three models on one answer, and the recorded gate."""
        kl, kl_base = (self.token_kl(answer, side, strengths) for side in ("compiled", "base"))
        return AnswerDivergence(kl, kl_base, *self._limit(float(kl_base.mean()), strengths))

    def _limit(self, kl_base: float, strengths: Sequence[float]) -> tuple[float | None, str]:
        """The recorded gate on the mean KL(steered||compiled), or why there is none here."""
        member = self.members[0]
        if len(self.members) > 1:
            return None, "the gates are of each program alone"
        if strengths[0] != 1:
            adapter = member.parity.adapter if member.parity else None
            return None, (adapter.scale_remark if adapter else "") or "the gates are of strength 1"
        if member.parity is None:
            return None, "it has no parity report of these files; make one with 'compile-steer verify'"
        dtype = str(self.base.model.dtype).removeprefix("torch.")
        if dtype != member.parity.compute_dtype:
            return None, f"the gates are of {member.parity.compute_dtype}, this is {dtype}"
        # Older reports do not carry their settings: they are the recipe's.
        verify = member.parity.settings.get("verify", member.provenance.recipe.get("verify", {}))
        recipe = Recipe.recall({**member.provenance.recipe, "verify": verify}, member.folder)
        d = member.parity.divergence
        measured = f"{d.kl_remaining.value:.2%} in its report"
        return kl_limit(member.parity, recipe.verify.gates, kl_base), measured


def _load_base(member: Member, model: str | None, device: str | None, dtype: str | None) -> LoadedModel:
    """The base as the artifact's recipe uses it; raises as `load`, and for a recorded path out of the folders in use."""
    record, path = member.provenance.recipe, member.folder
    if not record:  # made from Python
        return load(model or member.provenance.model, device=device or "auto", dtype=dtype or "float32")
    changes = {name: value for name, value in (("model", model), ("device", device), ("dtype", dtype)) if value}
    recipe = Recipe.recall({**record, **changes}, path)
    if model is None:
        require_model_in_use(recipe.model, recipe_folder(path, record) or path)
    return load_base(recipe)
