"""The sections of a recipe: every option of every stage, with its type and its limits."""

from compile_steer.settings.compile import (
    BackendName,
    Calibration,
    ClosedForm,
    ClosedFormStage,
    Compile,
    Distill,
    Full,
    Training,
)
from compile_steer.settings.extract import ChoiceMethod, Extract, Method, PairMethod, Trained
from compile_steer.settings.validate import Claim, Target, Validate
from compile_steer.settings.verify import Form, Gates, Verify, any_gguf

__all__ = [
    "BackendName",
    "Calibration",
    "ChoiceMethod",
    "Claim",
    "ClosedForm",
    "ClosedFormStage",
    "Compile",
    "Distill",
    "Extract",
    "Form",
    "Full",
    "Gates",
    "Method",
    "PairMethod",
    "Target",
    "Trained",
    "Training",
    "Validate",
    "Verify",
    "any_gguf",
]
