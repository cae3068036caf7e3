"""What knows a model family: ViTs, T5s and decoder-only language models as layers."""
