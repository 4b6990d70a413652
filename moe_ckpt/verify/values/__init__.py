"""Part 2: values of scales."""
