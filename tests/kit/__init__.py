"""What tests are made with: checkpoints in every layout and encoding, faults, runs of the command."""
