"""Ranks, and the DeepSpeed engine: the step's collectives live here."""
