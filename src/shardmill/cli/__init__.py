"""The command `shardmill`: data to standard output, words to standard error."""
