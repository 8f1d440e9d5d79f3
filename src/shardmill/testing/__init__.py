"""For tests of what is built on shardmill: real nodes on loopback ports."""
