"""Rows of the conformance table, a module for each family of methods; `conformance_methods` reads them all."""
