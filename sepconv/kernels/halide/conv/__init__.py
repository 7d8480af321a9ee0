"""Algorithms: one file per operation, each with the loops that its schedule asks for."""
