"""Offline work over a node: many objects, for hours, in spite of kills; with a manifest in the destination."""
