"""Layers that stand in a rewritten torch model: factorized, fused, recurrent, and what is derived from their weights."""
