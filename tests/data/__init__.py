"""Tests of `lightning_distopt.data`."""
