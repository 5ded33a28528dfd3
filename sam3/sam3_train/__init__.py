"""Training plumbing that all stages share, each thing once."""
