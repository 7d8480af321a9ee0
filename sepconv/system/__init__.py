"""The machine and its files: what every other part may ask of them, and what a number was measured with."""
