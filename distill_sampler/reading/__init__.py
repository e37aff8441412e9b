"""Who reads, and how: token sequences in, statistics of their scored tokens out."""
