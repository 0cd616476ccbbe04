"""Pretends to be the device: workloads, a cost model and a virtual clock around the scheduler."""
