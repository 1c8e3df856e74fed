"""From files to batches: sources, decoding, transforms, and the order in which pictures come."""
