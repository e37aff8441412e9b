"""Data as it lies on disk: files, columns, conversations, and the tokens that a chat template makes of them."""
