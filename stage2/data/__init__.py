"""Clips of annotated videos, and images as clips of one frame."""
