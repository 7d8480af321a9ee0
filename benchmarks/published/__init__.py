"""Conversion of networks that somebody else trained and published: what is left of each at several budgets."""
