"""What trained runs score, and what may be said about it; no training imports this."""

from .compare import compare_runs, difference, verdicts
from .pictures import worst_cases
from .results import comparable, comparison_table, evaluate_run, headline, joined, read_results, results_table

__all__ = ["comparable", "compare_runs", "comparison_table", "difference", "evaluate_run", "headline", "joined"]
__all__ += ["read_results", "results_table", "verdicts", "worst_cases"]
