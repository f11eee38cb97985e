"""Drives for other libraries, one module a library; each needs its library, and only it."""
