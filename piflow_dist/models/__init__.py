"""Transformers and their heads: plain modules that run alone on a CPU and know nothing of parallelism."""
