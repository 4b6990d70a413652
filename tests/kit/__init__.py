"""What tests are made with: checkpoints of every kind, faults, runs of the command."""
