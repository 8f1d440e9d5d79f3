"""What people use today, as they use it: each a process of its own, in the environment of requirements/bench.lock."""
