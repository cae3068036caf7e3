"""Fast scoring of layer paths: the twin of ``rmm_lab.reward``."""
