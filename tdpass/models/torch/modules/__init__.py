"""Torch modules as they come: read, copied, made plain and changed in place."""
