"""What is kept: one schema of scores and plans, partial passes, the folder of a run."""
