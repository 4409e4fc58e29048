"""Programmable variational inference, all of its names in one place: ``from locum.infer import vi``.

Distributions (`vi.normal`), gradient strategies (`vi.Reinforce`), sites that pair the two (`vi.normal_reinforce`), programs
(`vi.simulate`, `vi.assess`), the expectation of a program and its gradient (`vi.expectation`), random densities (`vi.marginal`,
`vi.normalize`), objectives (`vi.ELBO`) and the fit (`vi.ProgVI`). Needs the extra ``vi``.
"""

from locum.errors import MissingExtra

try:
    import jax  # noqa: F401
    import optax  # noqa: F401
except ImportError:
    raise MissingExtra("locum.infer.vi", "vi") from None

from locum.infer import densities, distributions, objectives, programs, progvi, strategies
from locum.infer.densities import *  # noqa: F403
from locum.infer.distributions import *  # noqa: F403
from locum.infer.objectives import *  # noqa: F403
from locum.infer.programs import *  # noqa: F403
from locum.infer.progvi import *  # noqa: F403
from locum.infer.strategies import *  # noqa: F403
from locum.infer.vi_audit import audit
from locum.infer.vi_fit import Fitted, VIResult

__all__ = [
    "Fitted",
    "VIResult",
    "audit",
    *distributions.__all__,
    *strategies.__all__,
    *programs.__all__,
    *densities.__all__,
    *objectives.__all__,
    *progvi.__all__,
]
