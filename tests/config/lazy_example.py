"""A lazy config for tests."""

train = {"max_iter": 3}
number = 7
