"""Factored layers as calls of fused operators."""
