from .paired import TauDifference, tau_difference
from .summary import summarize, table

__all__ = ["TauDifference", "summarize", "table", "tau_difference"]
