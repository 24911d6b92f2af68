"""How bytes and results move; knows nothing of any method."""
