"""The usual names of columns, to find those that the user has not named."""

from __future__ import annotations

GROUPS = ("prompt_id", "group_id", "problem_id", "question_id", "group")
"""Names of columns that are equal for rows that answer the same prompt."""
TEACHERS = ("teacher", "teacher_model", "model", "model_name", "generator")
"""Names of columns with the teacher who wrote a response."""
DOMAINS = ("domain", "category", "subject", "task", "topic", "level", "source")
"""Names of columns with the kind of task of a prompt."""
VERDICTS = ("correct", "is_correct", "passed")
"""Names of columns that tell whether a response is correct."""
