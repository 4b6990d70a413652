"""ModelOpt's dialect."""
