"""Training and evaluation programs: data, loops and their command lines."""
