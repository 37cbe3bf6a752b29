"""Run folder, checkpoint, ledger, progress, and the Flower processes of a run."""
