"""Write: prompts -> contrast pairs that the model wrote itself and that the recipe's scorer has seen the behaviour in."""

from compile_steer.write.report import SplitReport, WritingReport
from compile_steer.write.stage import write

__all__ = ["SplitReport", "WritingReport", "write"]
