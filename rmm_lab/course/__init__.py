"""What the notebooks use: widgets, checks and exercises."""
