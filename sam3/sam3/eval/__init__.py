"""Results in the form that evaluation wants them."""
