"""Compile a steering vector into ordinary weights, and prove that they match."""

from compile_steer.hooks import steered
from compile_steer.program import Intervention, Program, Site

__all__ = ["Intervention", "Program", "Site", "steered"]
