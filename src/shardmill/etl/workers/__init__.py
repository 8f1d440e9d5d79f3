"""Worker processes: what they are asked for, one of them, and all of a node."""
