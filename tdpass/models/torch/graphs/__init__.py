"""Fx graphs: read, and lifted into modules."""
