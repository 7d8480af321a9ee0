"""Loop sizes from shapes: the only folder that knows the machine."""
