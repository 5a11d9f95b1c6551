"""What initialisations and rank allocation read of a model and its data."""
