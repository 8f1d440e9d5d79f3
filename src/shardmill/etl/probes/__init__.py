"""Trials of a version at its registration, on a few samples or a whole object."""
