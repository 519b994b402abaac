"""Analyses of a trained model, or of one in training: curvature, landscapes, paths between models; plain torch."""

from lightning_distopt.analysis.connectivity import Path, connect, on_curve
from lightning_distopt.analysis.density import Density, spectral_density
from lightning_distopt.analysis.diagnostics import (
    GradientDiversity,
    GradientNoise,
    ReplicaLosses,
    distances,
    effective_step_size,
    gradient_diversity,
    gradient_noise,
    replica_losses,
)
from lightning_distopt.analysis.directions import filter_normalized, gaussian_direction, random_direction
from lightning_distopt.analysis.history import History
from lightning_distopt.analysis.interpolation import Interpolation, interpolate
from lightning_distopt.analysis.lanczos import Eigenpairs, lanczos
from lightning_distopt.analysis.landscape import Landscape1D, Landscape2D, landscape_1d, landscape_2d
from lightning_distopt.analysis.lobpcg import lobpcg
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.operators import CurvatureOperator
from lightning_distopt.analysis.planes import Plane, plane_of_three, random_plane, trajectory_plane
from lightning_distopt.analysis.sharpness import Sharpness, average_sharpness, keskar_sharpness, worst_case_sharpness
from lightning_distopt.analysis.smoothness import Smoothness, estimate_smoothness
from lightning_distopt.analysis.spectrum import Spectrum, hessian_spectrum
from lightning_distopt.analysis.trace import TraceEstimate, estimate_trace

__all__ = [
    "CurvatureOperator",
    "Density",
    "Eigenpairs",
    "GradientDiversity",
    "GradientNoise",
    "History",
    "Interpolation",
    "Landscape1D",
    "Landscape2D",
    "Objective",
    "Path",
    "Plane",
    "ReplicaLosses",
    "Sharpness",
    "Smoothness",
    "Spectrum",
    "TraceEstimate",
    "average_sharpness",
    "connect",
    "distances",
    "effective_step_size",
    "estimate_smoothness",
    "estimate_trace",
    "filter_normalized",
    "gaussian_direction",
    "gradient_diversity",
    "gradient_noise",
    "hessian_spectrum",
    "interpolate",
    "keskar_sharpness",
    "lanczos",
    "landscape_1d",
    "landscape_2d",
    "lobpcg",
    "on_curve",
    "plane_of_three",
    "random_direction",
    "random_plane",
    "replica_losses",
    "spectral_density",
    "trajectory_plane",
    "worst_case_sharpness",
]
