"""Changes of a graph: sites replaced, norms folded, recurrence opened, integers brought in and out."""
