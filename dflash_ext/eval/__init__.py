from .summary import summarize, table

__all__ = ["summarize", "table"]
