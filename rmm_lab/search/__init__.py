"""A search from models to a merged model, and its rivals."""
