"""Policies: what the student's network outputs, a velocity field that needs no network to be followed."""

from piflow_dist.policies.dx import DXPolicy
from piflow_dist.policies.gmflow import GMFlowPolicy
from piflow_dist.policies.mean import MeanPolicy
from piflow_dist.policies.rollout import rollout, windowed_velocities, windowed_velocity

__all__ = ["DXPolicy", "GMFlowPolicy", "MeanPolicy", "rollout", "windowed_velocities", "windowed_velocity"]
