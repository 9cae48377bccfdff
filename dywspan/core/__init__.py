"""The maths: pure torch, no diffusers, no I/O."""
