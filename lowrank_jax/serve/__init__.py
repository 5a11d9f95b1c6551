"""Adapters of one base under names, and a different one for each row of a batch."""
