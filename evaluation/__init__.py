"""How good features are: takes a model and loaders, never a run."""
