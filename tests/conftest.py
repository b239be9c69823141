"""For all tests: property tests are not timed, because machines are shared and noisy."""

from hypothesis import settings

settings.register_profile("kvferry", deadline=None)
settings.load_profile("kvferry")
