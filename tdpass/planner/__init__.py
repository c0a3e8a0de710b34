"""Planning: candidates, their losses, and the choice under a budget."""
