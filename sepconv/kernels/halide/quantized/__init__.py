"""Convolutions of whole numbers (uint8 x int8), and what follows them in one pass: see `reference.quantized_conv`."""
