"""Interpreters that transforms run in, those built of packages included."""
