"""Stage 2: train the tracker's compressed memory on videos."""
