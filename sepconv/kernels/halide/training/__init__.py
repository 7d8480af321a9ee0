"""Stages in training: convolutions that apply norms as they read and gather statistics as they write."""
