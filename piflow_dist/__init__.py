"""Distillation of text-to-image flow models into few-step students by pi-Flow (arXiv 2510.14974)."""
