"""What ranks import, loaded once into the server that they are forked from (run_ranks(...))."""

from piflow_dist.launch.chaos import import_everything

import_everything()

import piflow_dist.parallel.groups  # noqa: E402, F401
import piflow_dist.parallel.tensor  # noqa: E402, F401
