"""What trained runs score, and what may be said about it; no training imports this."""

from .results import comparable, comparison_table, evaluate_run, headline, joined, read_results, results_table

__all__ = ["comparable", "comparison_table", "evaluate_run", "headline", "joined", "read_results", "results_table"]
