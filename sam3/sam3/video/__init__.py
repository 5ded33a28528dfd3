"""Frames in, results out: sources of frames, decoding ahead in a thread, and writers of overlays, masks and tracks.

Nothing is imported here: PyAV and decord are loaded by what needs them, when a video is opened.
"""
