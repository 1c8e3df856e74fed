"""The fast inference form of a network, derived from the readable one and checked against it."""

from coatnet.fast.engines import OptimizedModel as OptimizedModel
from coatnet.fast.engines import optimize as optimize
