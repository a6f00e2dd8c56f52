"""What is looked for before the first iteration."""
