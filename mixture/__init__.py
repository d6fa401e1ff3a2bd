"""From data sources to canonical samples to token shards. Nothing here imports torch."""
