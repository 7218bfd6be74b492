"""Metrics as plain functions; each folder is also an `evaluate` module: `evaluate.load(".../metrics/repetition")`."""

from .repetition.measures import rep_l, rep_n, rep_sen, repetition_scores

__all__ = ["rep_l", "rep_n", "rep_sen", "repetition_scores"]
