"""The output folder: shards, journal, resume, lock."""
