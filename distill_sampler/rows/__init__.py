"""From rows to a table of scores: what the command line, `score_rows`, datatrove and Ray have in common."""
