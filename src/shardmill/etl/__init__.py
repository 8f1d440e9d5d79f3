"""Versions of transforms, the environments they run in, worker processes seen from outside, and runs."""
