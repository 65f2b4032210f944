"""Pure functions of label maps."""
