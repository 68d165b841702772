"""Property tests draw the same examples in every run, and may take their time.

`python -m pytest --hypothesis-profile=search` draws new ones.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("steady", settings.get_profile("search"), derandomize=True)
settings.load_profile("steady")
