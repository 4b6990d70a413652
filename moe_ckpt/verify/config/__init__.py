"""Part 3: what runtimes make of the configuration."""
