"""Which nodes of a graph are sites, and who reads their weights."""
