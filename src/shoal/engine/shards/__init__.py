"""Replicas that several ranks hold together, while ranks come and go."""
