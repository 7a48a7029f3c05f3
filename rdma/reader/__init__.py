"""A reader's side: which peer and which path, and its blocks as slots of this host's pool."""
