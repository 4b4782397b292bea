"""Fits a generation into a memory limit: what it takes, from shapes alone, and which way of running it is chosen."""
