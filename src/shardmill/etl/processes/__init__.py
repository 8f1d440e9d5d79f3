"""Child processes seen from outside: zygotes, the channel to them, the memory they share, what they may do."""
