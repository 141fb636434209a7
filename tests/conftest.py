"""What every test gets: hypothesis profiles, one thread for torch and OpenMP."""

import os

# Before torch is imported: with one thread sums are added up in one order, and workers of xdist do not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Shared machines stall: a slow example is no failure here, and what is slow is measured in benchmarks/.
settings.register_profile("dev", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("CKPTSTORE_HYPOTHESIS_PROFILE", "dev"))
