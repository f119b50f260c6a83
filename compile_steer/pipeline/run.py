"""A run: a recipe with its model and data loaded, and the stages that choose its program.

A stage whose artifact is there and was made from the same inputs is kept, so that a run that was killed goes on where
it stopped. What is compiled, merged and verified of the program is in `pipeline.artifacts`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

from compile_steer.artifacts.files import digest, reuse_or_make, save_text, sha256, was_edited
from compile_steer.artifacts.paths import RunPaths, home_path, real_path
from compile_steer.artifacts.provenance import Origin, versions
from compile_steer.artifacts.revision import identity_of
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import SPLITS, Behaviour, Context
from compile_steer.data.encoding import check_texts
from compile_steer.data.pairs import pairs_sha256, read_pairs
from compile_steer.export.gguf import gguf_refusals
from compile_steer.extraction.generate_pairs import GenerationReport, kept_pairs
from compile_steer.extraction.stage import extract
from compile_steer.lowering.options import BackendName
from compile_steer.lowering.plan import Plan, plan
from compile_steer.models.chat import CURE, ChatSettings
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.source import revision_of
from compile_steer.pipeline.memory import require_memory
from compile_steer.recipe import CHAT_KEYS, Recipe
from compile_steer.steering.directions import Directions
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport
from compile_steer.validation.stage import validate
from compile_steer.validation.sweep import choose_layers
from compile_steer.validation.verdict import decide
from compile_steer.verification.options import any_gguf


@dataclass
class Run:
    """A recipe with its model and data loaded, and the folder that its artifacts lie in."""

    recipe: Recipe
    paths: RunPaths
    context: Context

    @staticmethod
    def open(recipe: Recipe, out: Path, progress: Progress, model: LoadedModel | None = None) -> Run:
        """Read the data first: it is quick, and the model may take minutes. Raises what either raises.

        Args:
            model: the recipe's, where it has been loaded already.
        """
        paths = RunPaths(out, recipe.name)
        require_apart(recipe, paths)
        data, path = recipe.data.read(recipe.folder), recipe.validate_.other_behaviour
        if path is not None:
            pairs = read_pairs("validate.other_behaviour", recipe.folder / path)
            places = {**data.places, "other_behaviour": list(pairs)}
            data = replace(data, other_behaviour=tuple(pairs.values()), places=places)
        if model is None:
            progress.remark(require_memory(recipe, data))
            model = load_base(recipe)
        if model.tokenizer.chat_template is None:
            progress.note(
                f"the model '{model.id}' has no chat template: a prompt is given to it as it is, and the response follows at "
                f"once. {CURE}"
            )
        notes = check_texts(model, data, answer_lengths(recipe))
        if recipe.data.generation is not None:
            data = with_generated_pairs(recipe, model, data, paths, progress)
            notes = check_texts(model, data, answer_lengths(recipe))
        for note in notes:
            progress.note(note)
        return Run(recipe, paths, Context(model, data, recipe.seed, progress, notes))

    @property
    def model(self) -> LoadedModel:
        return self.context.model

    @property
    def data(self) -> Behaviour:
        return self.context.data

    @property
    def progress(self) -> Progress:
        return self.context.progress

    def inputs(self, *sections: str, after: str = "") -> str:
        """Fingerprint of what a stage depends on: recipe sections, data, model, seed, libraries, the artifact before it."""
        model = self.model
        # Not the name: a copy, or another path to it, is the same model.
        identity = [identity_of(model.revision), self.recipe.dtype, self.recipe.seed, self.recipe.prompt_format]
        if model.chat != ChatSettings():
            identity.append(self.recipe.part(*CHAT_KEYS))
        # What another version computed is made again: it may have computed something else.
        return digest([self.recipe.part(*sections), self.data.hashes, identity, versions(), after])

    @property
    def bonds(self) -> dict[str, str]:
        """What a parity report of this run names beside artifact, program and base: its recipe, data and libraries."""
        return {
            "recipe": self.recipe.hash,
            "data": digest(self.origin().data_sha256),
            "versions": digest(versions()),
        }

    def require_unchanged(self) -> None:
        """Raise `ArtifactError` if the base or the program on disk is no longer the one that this run loaded."""
        revision, program_sha256 = revision_of(self.recipe.model), sha256(self.paths.program)
        problems = []
        if revision != self.model.revision:
            problems.append(
                f"the base {self.model.id} changed while it was used: {self.model.revision}, now {revision}."
            )
        if program_sha256 != self.program_sha256:
            problems.append(f"{self.paths.program} changed while it was used.")
        if problems:
            raise ArtifactError([*problems, "Nothing was recorded. Let nothing write there, and run this again."])

    def origin(self, directions_sha256: str = "") -> Origin:
        """What this run's directions, or the program chosen from them, are made from."""
        files = {
            "other_behaviour": pairs_sha256(self.data.other_behaviour),
            "imported": self.recipe.extract.imported_sha256(self.recipe.folder),
            "classifier": self.recipe.validate_.score.revision,
        }
        hashes = {**self.data.hashes, **{name: value for name, value in files.items() if value}}
        revision = self.model.revision
        return Origin(self.recipe.record, self.recipe.hash, hashes, revision, directions_sha256)

    def generated_pairs(self) -> GenerationReport:
        """Return the report on the pairs that the model generated when the run was opened; raises `RecipeError` if none."""
        if self.recipe.data.generation is None:
            raise RecipeError(
                f"data.kind {self.recipe.data.kind}: its rows have their responses, there is nothing to generate. The "
                "model generates the responses of kind: generated and kind: instructions."
            )
        return GenerationReport.load(self.paths.generation_report)

    def extract(self) -> Directions:
        """Return the directions of every block, from the training pairs."""
        options, positions = self.recipe.extract, self.recipe.validate_.positions
        sibling = "" if options.model is None else identity_of(revision_of(options.model))
        trained_at = positions if options.method == "trained" else ""  # other methods do not depend on them
        imported = options.imported_sha256(self.recipe.folder)
        inputs = self.inputs("data", "extract", after=f"{imported} {trained_at} {sibling}")

        def kept(path: Path) -> Directions | None:
            directions = Directions.load(path)
            return directions if directions.inputs == inputs else None

        def make() -> Directions:
            directions = extract(self.context, options.located(self.recipe.folder), positions=positions)
            directions = replace(directions, inputs=inputs)
            distributed.first(lambda: directions.save(self.paths.directions, self.origin().header()))
            return directions

        return reuse_or_make(self.paths.directions, kept, make)

    def validate(self) -> ValidationReport:
        """Choose the program, leave it and the report on it; extracts first if that was not done."""
        recipe, paths = self.recipe, self.paths
        # What the model lacks is refused before the work.
        choose_layers(recipe.validate_, self.model.layout.n_layers)
        directions = self.extract()
        directions_sha256 = sha256(paths.directions)
        scorer = recipe.validate_.score.revision
        after = digest([directions_sha256, [asdict(pair) for pair in self.data.other_behaviour], scorer])
        inputs = self.inputs("data", "extract", "validate", "ask", "too_high", after=after)

        def kept(path: Path) -> ValidationReport | None:
            report = ValidationReport.load(path)
            beside = {paths.program: report.program_hash, paths.prompts: report.prompts_sha256}
            same = all(file.is_file() and sha256(file) == recorded for file, recorded in beside.items())
            same = same and report.inputs == inputs and not was_edited(path)
            # Whoever computes the hashes again can write any verdict, but one that does not follow from the figures shows.
            same = same and decide(report, recipe.validate_) == (report.verdict, report.reasons)
            if same:
                self.progress.remark(f"Kept from an earlier run of the same recipe, data, model and libraries: {path}")
            return report if same else None

        def make() -> ValidationReport:
            result = validate(
                self.context,
                directions,
                recipe.validate_,
                readout=recipe.extract.readout,
                ask=recipe.ask,
                too_high=recipe.too_high,
                name=recipe.name,
            )

            def save() -> ValidationReport:
                result.program.save(paths.program, self.origin(directions_sha256).header())
                rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
                save_text(paths.prompts, "".join(rows))
                program_hash, prompts_sha256 = sha256(paths.program), sha256(paths.prompts)
                report = replace(result.report, program_hash=program_hash, prompts_sha256=prompts_sha256, inputs=inputs)
                report.save(paths.validation)  # last: it marks that program and rows belong together
                return report

            return distributed.first(save)

        report = reuse_or_make(paths.validation, kept, make)
        for name in ("program", "program_sha256", "plan"):  # another program may lie there now
            self.__dict__.pop(name, None)
        return report

    @cached_property
    def program(self) -> Program:
        """The program on disk, checked against the model; raises `ArtifactError`."""
        program, model = Program.load(self.paths.program), self.model
        model.layout.require_program(program, model.id, model.revision)
        return program

    @cached_property
    def program_sha256(self) -> str:
        """SHA-256 of the file that `program` was read from."""
        return self.program.sha256

    @cached_property
    def plan(self) -> Plan:
        """Which backends will run, and why the others will not.

        Raises:
            CannotLower: a backend that the recipe names refuses, all do, or the base cannot be a GGUF file that the
                recipe wants.
        """
        model = self.model
        problems = gguf_refusals(WeightPatch(), model) if any_gguf(self.recipe.verify.forms) else []
        if problems:
            raise CannotLower([*problems, "Leave the gguf forms out of verify.forms."])
        return plan(self.program, model.layout, self.recipe.compile.backends)


def require_apart(recipe: Recipe, paths: RunPaths) -> None:
    """Raise `RecipeError` where the run would write over a file or folder that it reads."""
    written = [paths.directions, paths.program, paths.validation, paths.prompts, paths.report, paths.work]
    written += [
        paths.place(backend, form) for backend in get_args(BackendName) for form in ("adapter", *recipe.verify.forms)
    ]
    if recipe.data.generation is not None:
        written += [paths.generation_report, *map(paths.pairs, SPLITS)]
    places = set(map(real_path, written))
    read = [(key, recipe.folder / path) for key, path in recipe.named_paths()]
    read += [
        (key, home_path(name))
        for key, name in (("model", recipe.model), ("extract.model", recipe.extract.model))
        if name
    ]
    problems = [
        f"{key}: {path} is where the run itself writes; choose another output folder (--out), another name, or move the file."
        for key, path in read
        if places & {real_path(path), *real_path(path).parents}
    ]
    if problems:
        raise RecipeError(problems)


def load_base(recipe: Recipe) -> LoadedModel:
    """Load the recipe's model as the recipe uses it; raises as `load`."""
    return load(
        recipe.model,
        device=recipe.device,
        dtype=recipe.dtype,
        prompt_format=recipe.prompt_format,
        chat=recipe.chat,
        device_map=recipe.device_map,
    )


def answer_lengths(recipe: Recipe) -> dict[str, int]:
    """How many tokens a model may add to the prompts of each part of the data."""
    validated, verified = recipe.validate_.max_new_tokens, recipe.verify.max_new_tokens
    lengths = {"validation": validated, "test": max(validated, verified), "heldout": verified, "neutral": verified}
    return {**lengths, "calibration": recipe.compile.calibration.max_new_tokens}


def with_generated_pairs(
    recipe: Recipe, model: LoadedModel, data: Behaviour, paths: RunPaths, progress: Progress
) -> Behaviour:
    """Return the data with the responses that the model generates; raises `RecipeError` if they give too few pairs."""
    options = recipe.data.generation
    if options is None:
        return data
    return kept_pairs(Context(model, data, recipe.seed, progress), options, recipe.validate_.score, paths)
