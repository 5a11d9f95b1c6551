"""Several adapters made into one."""
