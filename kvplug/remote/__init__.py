"""This host's side of other hosts: what an engine's pool lacks is fetched for it, and what the pool has is told."""
