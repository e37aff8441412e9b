"""Whether models can read each other's tokens, as far as the sizes of their vocabularies tell."""

from __future__ import annotations

PADDING = 1024
"""How many more columns a padded vocabulary may have than tokens. Seen: up to 971."""


def shared_columns(*columns: int, tokens: int | None, otherwise: str) -> int:
    """How many columns of their output heads, from the first one on, models with the same tokenizer have in common.

    Vocabularies are often padded, each model's to another size.

    Args:
        columns: the size of each model's output head.
        tokens: how many tokens the tokenizer has; None: unknown, and then as many as the smallest head.
        otherwise: the sentence for models that have different tokenizers.

    Raises:
        ValueError: a model lacks a column for some tokens, or has too many to be padded.
    """
    least = min(columns)
    known = least if tokens is None else tokens
    if least < known or max(columns) - known > PADDING:
        raise ValueError(otherwise)
    return least
