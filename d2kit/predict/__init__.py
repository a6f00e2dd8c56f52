"""Models applied to pictures: whole, in batches, in tiles."""
