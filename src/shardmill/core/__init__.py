"""The nouns: names, refs, specs, metadata, ranges, conditions, wire types, errors and the protocols between siblings."""
