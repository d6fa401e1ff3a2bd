"""What the trainers share: models, packed batches, attention, losses, checkpoints, the block trainer."""
