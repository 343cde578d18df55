"""Experts in few bits: rounding, a model in memory, a folder from file to file."""
