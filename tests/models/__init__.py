"""Tests of `lightning_distopt.models`."""
