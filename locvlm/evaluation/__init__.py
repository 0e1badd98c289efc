"""Predictions, scores, the report: one file per task family, pure numbers in metrics.py; no torch, no server."""
