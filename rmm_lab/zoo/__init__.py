"""Where checkpoints come from: training, and the models that ship."""
