"""Carrying a plan out: batches, reading, decoding, quantizing."""
