"""Who has which blocks: a hint in a Redis or Valkey, asked and told, and the peers that it names."""
