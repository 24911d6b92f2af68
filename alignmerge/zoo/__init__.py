"""Models made here: data, recipes, training, gates."""
