"""Validate: candidate directions -> one steering program and a report that says whether to compile it.

Layer and coefficient are chosen on the validation split and measured once on the test split.
"""

from compile_steer.validate.report import ValidationReport, block_name
from compile_steer.validate.stage import validate
from compile_steer.validate.sweep import candidates, choose_layers

__all__ = ["ValidationReport", "block_name", "candidates", "choose_layers", "validate"]
