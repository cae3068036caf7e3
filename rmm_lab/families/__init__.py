"""What knows a model family: ViTs and T5s as layers."""
