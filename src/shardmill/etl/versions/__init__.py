"""Versions of transforms: what they are known by, and where they are kept."""
