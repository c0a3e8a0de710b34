"""Layers that stand in a rewritten torch model.

Factorized, fused, recurrent, and what is derived from their weights.
"""
