"""Fine-tuning: where experts come from. What rebuilds ``data/`` lies there."""
