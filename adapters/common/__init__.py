"""What more than one engine's adapter needs."""
