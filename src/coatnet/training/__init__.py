"""Training, from the choice of settings to a run folder with a model and a report."""
