"""How one client searches: relaxation, schedule, steps, pruning."""
