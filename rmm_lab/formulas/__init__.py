"""Operators of the literature, with the checks and steps that all operators share."""
