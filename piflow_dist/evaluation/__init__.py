"""How good is a sampled folder: features, metrics, evaluation of one folder, and the report over several."""
