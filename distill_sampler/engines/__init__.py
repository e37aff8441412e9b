"""Readers that are not models in this process: a teacher's log-probabilities, kept on disk."""
