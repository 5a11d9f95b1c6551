"""Every number the README quotes, each with the command that makes it."""
