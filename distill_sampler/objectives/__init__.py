"""Losses beside the trainer's own: what a student learns from a teacher's distributions, states and attention."""
