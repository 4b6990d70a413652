"""What the loaders of runtimes make of a checkpoint, without running them."""
