"""Power-Law Decay Loss (PDL, arXiv 2505.16900): finetuning in which rare, informative tokens count for more.

The names below need torch alone (`TiltLogits` transformers, too) and can be lifted into any trainer; they are imported when first used, so that
`python -m pdl --help` does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "TokenFrequencies": "pdl.frequencies",
    "power_law_weights": "pdl.weights",
    "LossSums": "pdl.cross_entropy",
    "PowerLawDecayLoss": "pdl.cross_entropy",
    "weighted_cross_entropy": "pdl.cross_entropy",
    "linear_weighted_cross_entropy": "pdl.linear_cross_entropy",
    "TiltLogits": "pdl.tilt",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'pdl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
