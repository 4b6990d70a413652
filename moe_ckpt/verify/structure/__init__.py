"""Part 1: files, names, shapes."""
