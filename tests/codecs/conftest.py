"""Property tests have no deadline per example: they also run on machines that are busy training."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
