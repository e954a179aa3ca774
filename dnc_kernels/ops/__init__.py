"""The ops, autograd-aware and traceable by torch.compile. A folder per family: public functions and their checks in ``__init__``,
plain torch in ``reference``, the C++ kernels as torch ops in ``native``.
"""

from .embedding import *  # noqa: F403
from .embedding import __all__ as _embedding
from .momentum import *  # noqa: F403
from .momentum import __all__ as _momentum
from .similarity import *  # noqa: F403
from .similarity import __all__ as _similarity
from .upsample import *  # noqa: F403
from .upsample import __all__ as _upsample

__all__ = [*_embedding, *_momentum, *_similarity, *_upsample]
