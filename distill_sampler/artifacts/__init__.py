"""What a run keeps on disk: scores and plans in one schema, parts of unfinished passes, the run's record."""
