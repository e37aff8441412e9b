"""One host a file. Nothing is imported here: a host's packages are needed only by those who use that host."""
