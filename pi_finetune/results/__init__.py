"""Scores of runs: metrics, evaluation, run folders, statistics and their comparison."""
