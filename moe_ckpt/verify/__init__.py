"""Check a quantized checkpoint: what no loader says, and what would go wrong unseen."""
