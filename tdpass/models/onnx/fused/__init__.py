"""Parts of a graph that one operator computes: found, chosen and written."""
