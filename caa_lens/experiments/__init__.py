"""Measurements on top of the core: scores, sweeps, controls. Everything here runs models through `grid`."""
