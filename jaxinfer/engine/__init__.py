"""Requests, the scheduler, the runner of compiled steps and the sampler."""
