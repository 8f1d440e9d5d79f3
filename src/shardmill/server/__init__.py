"""HTTP: the only folder that knows it. Every face is a translation over the same node."""
