"""The report page and the leaderboard of teachers."""
