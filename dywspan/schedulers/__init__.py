"""Schedulers: the solvers behind diffusers' interface."""
