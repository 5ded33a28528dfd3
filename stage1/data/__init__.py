"""Stage-1 datasets and loaders."""
