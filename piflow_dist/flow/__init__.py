"""Flow matching without networks: the time schedule, guidance, and the samplers."""
