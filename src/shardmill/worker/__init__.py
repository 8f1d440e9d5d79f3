"""What runs in the transform's interpreter: zygote, loop, seeding, arena, limits.

Standard library and `shardmill.shards` only; the folder also runs staged in a private directory under an interpreter
that has nothing of shardmill installed.
"""
