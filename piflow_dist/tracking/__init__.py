"""MLflow and the local metrics file."""
