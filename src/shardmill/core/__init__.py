"""The nouns: names, refs, specs, metadata, ranges, conditions, wire types, errors, protocols between siblings."""
