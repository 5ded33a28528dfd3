"""What loaders of several stages share."""
