"""The ops, autograd-aware and traceable by torch.compile. A folder per family: public functions and their checks in ``__init__``,
plain torch in ``reference``, the C++ kernels as torch ops in ``native``.
"""

from .momentum import *  # noqa: F403
from .momentum import __all__ as _momentum
from .similarity import *  # noqa: F403
from .similarity import __all__ as _similarity
from .sinkhorn import *  # noqa: F403
from .sinkhorn import __all__ as _sinkhorn

__all__ = [*_momentum, *_similarity, *_sinkhorn]
