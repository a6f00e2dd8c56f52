"""What a dataset is before it is trained on: formats found, checked, repaired, split."""
