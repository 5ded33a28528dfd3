"""Stage 1 geometry fine-tune: a student trunk trained through the frozen parts that read its features."""
