"""Sampling from checkpoints over any number of processes, without the trainer's engine."""
