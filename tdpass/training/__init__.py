"""What every training method shares: terms, ADMM, schedules, the loop and its checkpoints."""
