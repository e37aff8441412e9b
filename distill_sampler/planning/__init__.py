"""From scores to the order of an epoch, and why each sample is in it or not."""
