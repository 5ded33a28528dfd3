"""The SAM heads: prompt encoder, two-way transformer, mask decoder and the interactive image predictor."""
