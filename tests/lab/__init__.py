"""What the labs of both engines share: tiny models, process groups, and a pool that belongs to one test."""
