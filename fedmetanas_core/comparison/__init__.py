"""A whole table of runs: planned from a TOML file, run, resumed, and turned into figures with their uncertainty."""
