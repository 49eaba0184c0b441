"""One file for each training objective: how a config becomes a model, a loss and a step."""
