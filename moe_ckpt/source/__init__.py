"""What a checkpoint holds: files, headers, configuration, and its weights as matrices."""
