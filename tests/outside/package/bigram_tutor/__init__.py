"""A table of bigram counts as a frozen tutor of a student, with metrics and a policy around it."""
