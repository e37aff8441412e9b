"""Losses in addition to the trainer's own, from a teacher's distributions, hidden states and attention."""
