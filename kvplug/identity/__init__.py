"""What names a block: the namespace, the chain of keys over its tokens, and which weights a model has by content."""
