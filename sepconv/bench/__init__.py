"""Measuring: networks against PyTorch (``latency``), operations and blocks (``operations``, ``blocks``), tables."""
