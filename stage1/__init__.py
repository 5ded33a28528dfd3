"""Stage 1: distil the SAM 3 image encoder into a student."""
