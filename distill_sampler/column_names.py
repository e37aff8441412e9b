"""What columns are usually called, for those that nobody named."""

from __future__ import annotations

GROUPS = ("prompt_id", "group_id", "problem_id", "question_id", "group")
"""Which rows answer the same prompt."""
TEACHERS = ("teacher", "teacher_model", "model", "model_name", "generator")
"""Who wrote a response."""
DOMAINS = ("domain", "category", "subject", "task", "topic", "level", "source")
"""What kind of task a prompt is."""
VERDICTS = ("correct", "is_correct", "passed")
"""Whether a response is correct."""
