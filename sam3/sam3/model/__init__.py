"""Model components, one a file."""
