"""Runs: one transform over one object, its output and its readers."""
