"""Typical and top-p filtering of next-token scores without a sort, in Triton: one launch, one read, one write."""

from .function import fused_typical_sample, problem, top_p_mask, typical_mask

__all__ = ["fused_typical_sample", "problem", "top_p_mask", "typical_mask"]
