"""Engine: requests, scheduler, runner of compiled steps, sampler."""
