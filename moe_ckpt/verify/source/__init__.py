"""Part 4: quantized again, or decoded, beside the source."""
