"""From scores to an epoch's plan, and why each sample is in it or not."""
