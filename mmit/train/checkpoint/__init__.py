"""Folders that describe themselves: the model in them, how they are written, found, and gone on from."""
