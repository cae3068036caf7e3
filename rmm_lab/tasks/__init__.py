"""Data sets: pictures and texts, with three splits each."""
